"""The Flower ServerApp: wires run config, strategy, measurements and export together."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp

from dare_agg.deploy.identities import read_identities
from dare_agg.downlink.protocol import FullDownlink
from dare_agg.downlink.ways import make_downlink
from dare_agg.errors import DareError, RunError, StateError
from dare_agg.flower import DareStrategy, RoundOutcome
from dare_agg.flower.limits import ReplyLimit
from dare_agg.flower.resume import keep_base, resume, save
from dare_agg.flower.round_strategy import RoundStrategy
from dare_agg.flower.transport import to_numpy, to_record
from dare_agg.rounds.adapters import merge_products
from dare_agg.rounds.state import StateFolder
from dare_agg.runs.by_client import by_client
from dare_agg.runs.by_task import TOLD_BY, by_client_and_task
from dare_agg.runs.claim import SERVER, claim
from dare_agg.runs.ending import COMPLETED, FAILED, INTERRUPTED, RUNNING
from dare_agg.runs.prometheus import exporter
from dare_agg.runs.rows import RunRow
from dare_agg.runs.variants import Variant
from server.adapter_facts import adapter_facts, say_adapters
from server.asking import agree_on_labels, ask, wait_for_nodes
from server.buffer_words import buffer_settings
from server.compared import METHODS
from server.config import RunConfig
from server.export import describe_model, export_model
from server.privacy import client_privacy, privacy_facts, promised
from server.reading import read_config, settled
from server.record_privacy import RECORDS, largest_told, promised_records, record_facts
from server.recorder import Recorder
from server.resumed import check_resumed
from server.secure import merge_models, secure_strategy
from server.several import rows_of
from server.start import read_start, secure_start

app = ServerApp()
Record = Callable[[RoundOutcome], None]
# The word for what a run does not train, in a client's answer and in each round's config.
FROZEN = "frozen-base"
# Of the model that the first client makes; how large it is only that client knows.
MAX_MODEL_BYTES = 1 << 36


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Check everything, then run the methods one after another on the same data and seeds."""
    config = read_config(context.run_config)
    folder = Path(config.output or f"runs/{context.run_id}").absolute()
    if config.resume:
        check_resumed(config, folder)
    with claim(folder, SERVER, resume=config.resume, rounds=config.num_rounds):
        run_methods(grid, context, config, folder)


def run_methods(grid: Grid, context: Context, config: RunConfig, folder: Path) -> None:
    """Run what the config names, recorded in ``folder``, which run.json says the end of."""
    port = config.prometheus_port
    shown = exporter(port, config.prometheus_host) if port else None
    recorder = Recorder(folder, config.model_dump(by_alias=True), shown)
    recorder.status(RUNNING)
    try:
        labels: tuple[str, ...] = ()
        if config.secure_merge:
            prints = merge_models(grid, config, recorder)
        elif config.secure:
            start = secure_start(config, context.run_config)
            labels, name = start.labels, f"secure-{config.secure}"

            def securely(record: Record) -> RoundStrategy:
                state = state_folder(folder, name)
                return secure_strategy(config, record, context.run_config, state)

            args = (grid, config, name, labels, recorder, securely, start.arrays)
            prints = {name: run_method(*args)}
        else:
            labels = agree_on_labels(grid, config)
            prints = {}
            for one, own in rows_of(config, settled):

                def plainly(
                    record: Record, one: Variant = one, own: RunConfig = own
                ) -> RoundStrategy:
                    return make_strategy(own, one.method, record, state_folder(folder, one.name))

                prints[one.name] = run_method(grid, own, one.name, labels, recorder, plainly)
    except BaseException as error:
        reason = str(error) if isinstance(error, DareError) else f"{type(error).__name__}: {error}"
        # A SuperLink that is told to stop a run ends its process.
        stopped = isinstance(error, KeyboardInterrupt | SystemExit)
        with contextlib.suppress(StateError):  # what ended the run may be a full disk
            recorder.status(INTERRUPTED if stopped else FAILED, error=reason)
        raise
    finally:
        recorder.close()
    recorder.status(COMPLETED, labels=list(labels), fingerprints=prints)


def run_method(
    grid: Grid,
    config: RunConfig,
    name: str,
    labels: tuple[str, ...],
    recorder: Recorder,
    make: Callable[[Record], RoundStrategy],
    start: ArrayRecord | None = None,
) -> str:
    """Run one method from the common start to its last round; returns the final fingerprint.

    ``make`` builds its strategy around the function that records each round. Without a
    ``start`` it is asked of the clients.
    """
    orders = ConfigRecord({"train": config.train_by(name), "method": name})
    if labels:
        orders["labels"] = list(labels)
    began = time.monotonic()
    totals = {"upload_bytes": 0, "download_bytes": 0}
    kept = StateFolder(state_folder(recorder.folder, name))
    moved: list[RoundOutcome] = []  # the last round that moved the model
    told_privacy: dict[str, float] = {}  # the most of all rounds

    def record(outcome: RoundOutcome) -> None:
        row = _row(name, outcome, time.monotonic() - began, bool(strategy.downlink.facts()))
        for key in totals:
            totals[key] += getattr(row, key)
        recorder.row(row)
        say_adapters(outcome.round, outcome.measurements)
        released = "privacy" in outcome.measurements  # noise alone, too
        if not outcome.measurements["accepted"] and not released:  # nothing to go on from
            return
        moved[:] = [outcome]
        for key, value in record_facts(outcome.train_metrics or {}).items():
            told_privacy[key] = max(value, told_privacy.get(key, value))
        if config.keep_state:
            # After the row: a resumed run drops rows of rounds that were not kept.
            told = {
                "totals": totals,
                "clock": row.seconds,
                FROZEN: str(orders.get(FROZEN, "")),
                **_facts(outcome),
                "record_privacy": told_privacy,
            }
            save(strategy, kept, outcome, told)

    strategy = make(record)
    strategy.standing.tell = lambda stand: recorder.now({"method": name, **asdict(stand)})
    resumed = resume(strategy, kept) if config.resume else None
    recorder.rewind(name, resumed.round if resumed else 0)
    if resumed is not None:
        totals.update(resumed.facts["totals"])
        began -= float(resumed.facts.get("clock", 0.0))  # what the run has taken so far
        told_privacy.update(resumed.facts.get("record_privacy", {}))
        frozen = str(resumed.facts.get(FROZEN, ""))
        initial = None if config.base else to_record(kept.load_base())
    else:
        initial, frozen = (start, "") if config.base or start else begin(grid, config, orders)
        if config.keep_state:
            keep_base(kept, initial or strategy)
    if frozen:
        orders[FROZEN] = frozen
    base = strategy_base(strategy, initial)
    if resumed is not None and resumed.round >= config.num_rounds:
        arrays, fingerprint, facts = resumed.arrays, resumed.version, resumed.facts
    else:
        result = strategy.start(
            grid,
            resumed.arrays if resumed else initial,
            num_rounds=config.num_rounds,
            train_config=orders,
            evaluate_config=orders,
            start_round=resumed.round + 1 if resumed else 1,
            step_state=resumed.step_state if resumed else None,
        )
        if not moved:
            raise RunError(f"method {name}: no round was finished")
        arrays, fingerprint, facts = result.arrays, moved[0].model.ref.version, _facts(moved[0])
    if config.base:
        fingerprint = strategy.fingerprint()
    if config.save_model:
        provenance = {
            "base_fingerprint": base,
            "final_fingerprint": fingerprint,
            "method": name,
            "rounds": facts["rounds"],
            "clients": facts["clients"],
            **totals,
            "seed": config.seed,
            "metrics": facts["metrics"],
            **promised(strategy),
            **promised_records(config, told_privacy),
            "config": config.model_dump(by_alias=True),
        }
        out = recorder.folder / f"model-{name}"
        if config.base:
            strategy.save_model(out, overwrite=True)
            describe_model(out, model=config.model, provenance=provenance)
        else:
            export_model(
                out,
                to_numpy(arrays),
                model=config.model,
                labels=labels,
                provenance=provenance,
            )
    return fingerprint


def state_folder(folder: Path, method: str) -> Path:
    """Where a method of the run in ``folder`` keeps its state."""
    return folder / "state" / method


def begin(grid: Grid, config: RunConfig, orders: ConfigRecord) -> tuple[ArrayRecord, str]:
    """What a run starts from: the file the config names, else what the first client makes.

    Over a slow link the file spares the whole model's way up; clients that make the same base
    themselves are not sent it either. With it comes what names the tensors that the run does not
    train, which all clients must have alike, "" where that is not known.
    """
    if config.initial:
        return to_record(read_start(config)), ""
    first = wait_for_nodes(grid, config)[:1]
    limit = ReplyLimit(MAX_MODEL_BYTES)
    content = ask(grid, first, "initial", orders, config.node_timeout, limit)[0]
    initial, said = content["arrays"], content.config_records.get("description", ConfigRecord())
    assert isinstance(initial, ArrayRecord)
    return initial, str(said.get(FROZEN, ""))[:64]


def _facts(outcome: RoundOutcome) -> dict[str, Any]:
    """What the model card says of a finished round."""
    return {
        "rounds": outcome.round,
        "clients": len(outcome.measurements["clients"]),
        "metrics": dict(outcome.client_metrics or {}),
    }


def strategy_base(strategy: RoundStrategy, initial: ArrayRecord | None) -> str:
    """Fingerprint of the state a run starts from; None is the strategy's base on disk."""
    from dare_agg.vectors.model import global_model

    if initial is None:
        strategy.begin()
        return strategy.broadcasting.base_version
    terms = strategy.settings.terms
    model = global_model(
        to_numpy(initial),
        dense=terms.dense,
        exclude=terms.exclude,
        by_form=strategy.broadcasting.by_form,
    )
    return model.ref.version


def make_strategy(config: RunConfig, name: str, record: Any, state: Path) -> RoundStrategy:
    """Build the strategy of one plain method from the run config; ``state`` is its folder."""
    full = config.downlink == FullDownlink.name
    on_disk: dict[str, Any] = {}
    if config.base:
        on_disk = {"base": config.base, "state": state, "verify_every": config.verify_every}
    product = config.lora_merge == "product" and config.train_by(name) == "lora"
    words: dict[str, Any] = {
        "steps": (merge_products,) if product else (),
        "scaling": config.scaling,
        "drop_rate": config.drop_rate,
        "values": config.values,
        "mask": config.mask,
        "keep_rates": config.keep_rates,
        "dense_values": config.dense_values,
        "server_step": config.step(),
        "dense": config.dense_by(name),
        **METHODS[name].words,
    }
    if words["method"] == "wudi":
        words |= {"directions": config.directions, "direction_bits": config.direction_bits}
    return DareStrategy(
        fraction_train=config.fraction_train,
        fraction_evaluate=1.0 if config.evaluate else 0.0,
        min_train_nodes=min(config.min_clients, 2),
        min_evaluate_nodes=1,
        min_available_nodes=config.min_clients,
        exclude=config.exclude,
        weighting=config.weighting,
        weight_bound=config.weight_bound,
        robust=config.robust,
        byzantine=config.byzantine,
        seed=config.seed,
        run=str(config.seed),
        # The result is the same whatever the number of threads.
        threads=min(8, os.cpu_count() or 1),
        deadline=config.deadline or None,
        node_timeout=config.node_timeout,
        min_replies=config.min_replies,
        max_empty_rounds=config.max_empty_rounds,
        privacy=client_privacy(config, state),
        buffer=buffer_settings(config, state),
        train_metrics_aggr_fn=largest_told if config.dp == RECORDS else None,
        round_hook=record,
        # FedAvg and the head alone are there to compare with: they send what they send.
        upload_budget=config.budget() if "drop_rate" not in METHODS[name].words else None,
        identities=read_identities(config.identities) if config.identities else None,
        # Of a base on disk only steps travel, in the form "auto" unless another is named.
        downlink=None if config.base and full else make_downlink(config.downlink),
        **on_disk,
        **words,
    )


# Keys of a row that stand there only where there is something to say.
_WHERE_ANY = ("away", "refused", "evaluate_failed", "weights_cut", "noise_warning", "robust",
              "buffer")  # fmt: skip


def _secure_facts(measured: Mapping[str, Any]) -> dict[str, Any]:
    """What a secure round tells beyond a plain one; empty for a plain one."""
    found = measured.get("secure", {})
    names = ("lone_share", "conflict_share", "clipped_share", "bits", "word_bits")
    return {f"secure_{name}": found[name] for name in names if name in found}


def _sent(measured: Mapping[str, Any]) -> dict[str, Any]:
    """What clients sent of each value, and the noise of what they did not; of a plain round."""
    rates = measured.get("drop_rates")
    if not rates or "noise" not in measured:
        return {}
    return {
        "drop_rate": math.fsum(rates) / len(rates),
        "value_format": ", ".join(sorted(set(measured["values"]))),
        "noise": measured["noise"],
        "noise_of_change": measured["noise_of_change"],
    }


def _row(method: str, outcome: RoundOutcome, seconds: float, stepwise: bool) -> RunRow:
    """The row of a finished round."""
    measured: Mapping[str, Any] = outcome.measurements
    count = max(1, len(measured["update_bytes"]))
    updates, dense = sum(measured["update_bytes"]), sum(measured["dense_bytes"])
    statistics = sum(measured.get("statistics_bytes", ()))
    uploaded = updates + dense + statistics
    merge = measured.get("merge", {})
    client: dict[str, Any] = dict(outcome.client_metrics or {})
    by_task = by_client_and_task(measured.get("evaluated", ()))
    client = {key: value for key, value in client.items() if TOLD_BY not in key}
    # The mean of the clients' is not that of all their tokens; without a loss there is none.
    if client.pop("perplexity", None) is not None and isinstance(client.get("loss"), float):
        client["perplexity"] = math.exp(max(0.0, min(client["loss"], 700.0)))
    down, evaluated = sum(measured["download_bytes"]), measured.get("evaluate_download_bytes", 0)
    if stepwise:
        # A step reaches its clients with whatever is asked first, mostly the evaluation.
        down += evaluated
    return RunRow.of(
        method,
        outcome.round,
        client,
        train_loss=dict(outcome.train_metrics or {}).get("train-loss"),
        clients=len(measured["clients"]),
        accepted=measured["accepted"],
        rejected=measured["rejected"],
        **{key: told for key in _WHERE_ANY if (told := measured.get(key))},
        **({"by_client": told} if (told := by_client(measured)) else {}),
        **({"by_task": by_task} if by_task else {}),
        parameters=outcome.model.delta.size,
        update_bytes_per_client=updates // count,
        dense_bytes_per_client=dense // count,
        statistics_bytes_per_client=statistics // count,
        upload_bytes_per_client=uploaded // count,
        download_bytes_per_client=down // max(1, len(measured["download_bytes"])),
        upload_bytes=uploaded,
        download_bytes=down,
        message_upload_bytes=sum(measured["upload_bytes"]),
        evaluate_download_bytes=evaluated,
        **_sent(measured),
        survivors_per_element=measured.get("survivors_per_element"),
        sign_conflict=merge.get("sign_conflict"),
        touched=merge.get("touched"),
        **_secure_facts(measured),
        **privacy_facts(measured),
        **record_facts(outcome.train_metrics or {}),
        **adapter_facts(measured),
        merged_norm=measured.get("merged_norm"),
        delta_max=max(measured["delta_max"], default=None),
        share_above=max(measured["share_above"], default=None),
        round_seconds=measured["seconds"],
        seconds=seconds,
    )

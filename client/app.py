"""The Flower ClientApp: wires messages to tasks; the mod turns replies into updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from flwr.app import (
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp

from client.config import ConfigValue, TaskConfig, place, task_config
from client.kept_optimizer import KeptOptimizer
from client.models import model_path
from client.own import own_words
from client.partition import hold_out, partition
from client.record_budget import (
    Party,
    begin_training,
    check_record_words,
    party_of,
    record_privacy,
    train_privately,
)
from client.rows import Indices
from client.schedule import Progress
from client.training import FineTuning, build_task
from dare_agg.errors import ConfigError
from dare_agg.flower import STATISTICS_KEY, dare_mod, offer_base
from dare_agg.flower.reception import client_name, folder_of
from dare_agg.flower.secure.gate import is_guarded
from dare_agg.flower.secure.mod import secure_mod, secure_queries
from dare_agg.flower.transport import to_record
from dare_agg.flower.warm import warm_trainer

# The word for what a run does not train, in the answer to "initial" and in each round's config.
FROZEN = "frozen-base"


def own_files(context: Context) -> list[Path]:
    """What lies on this node's disk of its data and model."""
    config = task_config(_run_config(context), context.node_config)
    return [Path(name) for name in (config.data, config.test_data, config.model) if name]


app = ClientApp(mods=[warm_trainer("client.app:app", own_files), secure_mod, dare_mod])
secure_queries(app, find_base=model_path)


# Where the process lives on between messages (simulation, warm trainer), model and tokens do.
@lru_cache(maxsize=2)
def _task(config: TaskConfig) -> FineTuning:
    return build_task(config)


def _own_task(msg: Message, context: Context) -> FineTuning:
    record = msg.content.config_records.get("config", ConfigRecord())
    labels = record.get("labels", [])
    assert isinstance(labels, list)
    return _task(
        task_config(
            _run_config(context),
            context.node_config,
            labels=tuple(str(name) for name in labels),
            train=str(record.get("train", "")),
        )
    )


def _run_config(context: Context) -> Mapping[str, ConfigValue]:
    """The run config; a guarded party's paths and columns are its own."""
    guarded = is_guarded(context)
    return own_words(context.run_config, context.node_config) if guarded else context.run_config


# The parts of all clients are cut at once and kept: a process serves hundreds of them.
@lru_cache(maxsize=2)
def _train_rows(config: TaskConfig, rule: str, alpha: float, count: int) -> Sequence[Indices]:
    rows = _task(config).train_rows
    if count == 1:
        return [np.arange(len(rows))]
    return partition(rule, rows.labels, rows.groups, count, alpha=alpha, seed=config.seed)


def _own_rows(task: FineTuning, context: Context) -> tuple[Indices, Indices]:
    """The training rows that are this node's: those it trains on, and those it holds out."""
    run = context.run_config
    number, count = place(run, context.node_config)
    rows = _train_rows(task.config, str(run["partition"]), float(run["alpha"]), count)[number]
    return hold_out(rows, task.config.held_out, (task.config.seed, number))


@app.query("describe")
def describe(msg: Message, context: Context) -> Message:
    """Say which labels this node's data has, before anything trains.

    Raises `ConfigError` where its task refuses one of the server's ``needs``.
    """
    task = _own_task(msg, context)
    needs = msg.content.config_records["config"].get("needs", [])
    assert isinstance(needs, list)
    task.kind.check(str(need) for need in needs)
    if task.config.held_out:
        _own_rows(task, context)  # raises where none would be left to train on
    labels = list(task.data.label_names) if task.kind.agreed_labels else []
    described = ConfigRecord(
        {"labels": labels, "rows": len(task.train_rows), "notes": list(task.data.notes)}
    )
    return Message(RecordDict({"description": described}), reply_to=msg)


@app.query("initial")
def initial(msg: Message, context: Context) -> Message:
    """Return the state that training starts from: the public base and a seeded head."""
    task = _own_task(msg, context)
    content = RecordDict({"arrays": to_record(task.initial_state())})
    if task.frozen:
        content["description"] = ConfigRecord({FROZEN: task.frozen})
    return Message(content, reply_to=msg)


@offer_base
def own_base(msg: Message, context: Context) -> Mapping[str, np.ndarray]:
    """The base that this client makes by itself: it need not travel."""
    return _own_task(msg, context).initial_state()


@app.train()
def train(msg: Message, context: Context) -> Message:
    """Train on this node's rows for one round."""
    task = _own_task(msg, context)
    run = context.run_config
    number, _ = place(run, context.node_config)
    rows, _ = _own_rows(task, context)
    config = msg.content.config_records["config"]
    # Secure rounds want other draws after each start of the server; plain ones have none.
    start = [config["start-seed"]] if "start-seed" in config else []
    seed: Sequence[int] = (task.config.seed, int(config["server-round"]), number, *start)  # type: ignore[arg-type]
    progress = Progress(int(config["server-round"]), int(run["num-rounds"]))  # type: ignore[arg-type]
    moments = None
    if task.config.keep_optimizer:
        moments = _kept_optimizer(context, str(config.get("method", "")), progress.round)
    received, method = _state(msg, task), str(config.get("method", ""))
    words = {"seed": seed, "progress": progress, "moments": moments}
    if (privacy := record_privacy(_run_config(context), context.node_config)) is not None:
        check_record_words(task.config)
        run_name = f"{_run_name(context)} {method}"
        state, metrics = train_privately(
            lambda how: task.train(received, rows, privately=how, **words)[0],  # type: ignore[arg-type]
            lambda: begin_training(
                _party(context), privacy, task.config, len(rows), run_name,
                progress.rounds - progress.round + 1, {"seed": seed}, received,
            ),
            task.config,
        )  # fmt: skip
        examples = len(rows)
    else:
        state, examples, metrics = task.train(received, rows, **words)  # type: ignore[arg-type]
    measured = MetricRecord({"num-examples": examples, **metrics})
    reply = RecordDict({"arrays": to_record(state), "metrics": measured})
    if "statistics" in config:
        found = task.statistics(
            str(config["statistics"]), state, rows, examples=int(str(run["statistics-examples"]))
        )
        reply[STATISTICS_KEY] = to_record(found)
    return Message(reply, reply_to=msg)


def _kept_optimizer(context: Context, method: str, number: int) -> KeptOptimizer:
    """Where this node's moments of a run lie; a resumed run is the one that it goes on with."""
    return KeptOptimizer(
        folder_of(context) / "optimizer",
        client_name(context) or str(context.node_id),
        (_run_name(context), str(context.run_config["seed"]), method),
        number,
    )


def _run_name(context: Context) -> str:
    """What names a run to its clients: a resumed one is the one that it goes on with."""
    return str(context.run_config["output"]) or str(context.run_id)


def _party(context: Context) -> Party:
    """Whose budget a training of this node is charged to."""
    return party_of(
        context.node_config, _run_name(context), client_name(context), folder_of(context)
    )


@app.evaluate()
def evaluate(msg: Message, context: Context) -> Message:
    """Evaluate on this node's share of the test rows, or on the rows that it holds out.

    In a simulation the shares are disjoint and cover the whole common test set, so their
    weighted mean is the accuracy on it.
    """
    task = _own_task(msg, context)
    number, count = place(context.run_config, context.node_config)
    split, rows = "test", np.arange(number, len(task.test_rows), count)
    if task.config.held_out:
        split, (_, rows) = "train", _own_rows(task, context)
    metrics = task.evaluate(_state(msg, task), rows, split=split)
    examples = len(task.readable(split, rows))
    measured = MetricRecord({"num-examples": examples, **metrics})
    return Message(RecordDict({"metrics": measured}), reply_to=msg)


def _state(msg: Message, task: FineTuning) -> dict[str, np.ndarray]:
    """The received state; a head of another task's shape gives way to this task's own.

    Raises `ConfigError` where this node's model is not that which the state belongs to.
    """
    record = msg.content.config_records.get("config", ConfigRecord())
    asked = str(record.get(FROZEN, ""))
    if asked and asked != task.frozen:
        raise ConfigError(
            f"model {task.config.model!r} of this node has other weights than the first client's: "
            f"what is trained beside them means nothing there ({task.frozen[:12]}, the run's is "
            f"{asked[:12]}); give this node the run's base, whole or in four bits as the others"
        )
    received = {name: array.numpy() for name, array in msg.content["arrays"].items()}  # type: ignore[union-attr]
    lacking = [n for n in task.initial if n not in received and not n.startswith("head.")]
    if lacking and task.config.train == "lora":
        raise ConfigError(
            f"the run's adapters have no {lacking[0]!r}, which this node's settings ask for; start "
            "from an adapter of the same lora-targets, lora-bias and lora-whole"
        )
    for name, array in task.initial.items():
        other_head = name.startswith("head.") and name in received
        if name not in received or (other_head and received[name].shape != array.shape):
            received[name] = array
    return received

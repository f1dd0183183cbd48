"""Secure runs by run config: training in secure sums, or one merge of the parties' models."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from dare_agg.codec.mask import parse_drop_rate
from dare_agg.downlink.ways import make_downlink
from dare_agg.errors import ConfigError
from dare_agg.flower.secure.merge import secure_merge
from dare_agg.flower.secure.strategy import SecureStrategy
from dare_agg.runs.rows import RunRow
from dare_agg.secure.roster import Roster, read_roster
from dare_agg.vectors.patterns import compile_patterns
from server.config import RunConfig
from server.export import base_folder
from server.privacy import shared_privacy
from server.recorder import Recorder, write_json

LOG = logging.getLogger("flwr")
# One shot at p = .9 with one common mask loses accuracy; rounds make it up.
ONE_SHOT_MOST = 0.5


def open_roster(config: RunConfig) -> Roster:
    return read_roster(Path(config.secure_roster))


def secure_strategy(
    config: RunConfig, record: Any, run_config: Mapping[str, Any], state: Path
) -> SecureStrategy:
    """Build the strategy of a secure training run; ``run_config`` is what the parties see.

    ``state`` is its folder, where a budget of privacy lies.
    """
    return SecureStrategy(
        secure=replace(config.secure_settings(), privacy=shared_privacy(config, state)),
        roster=open_roster(config),
        run_config=run_config,
        stage_seconds=config.secure_stage_seconds,
        fraction_train=config.fraction_train,
        fraction_evaluate=1.0 if config.evaluate else 0.0,
        min_evaluate_nodes=1,
        min_available_nodes=config.min_clients,
        dense=() if config.train == "head" else config.dense,
        exclude=config.exclude,
        server_step=config.step(),
        robust=config.robust,
        byzantine=config.byzantine,
        downlink=make_downlink(config.downlink),
        seed=config.seed,
        run=str(config.seed),
        deadline=config.deadline or None,
        node_timeout=config.node_timeout,
        max_empty_rounds=config.max_empty_rounds,
        round_hook=record,
    )


def merge_models(grid: Grid, config: RunConfig, recorder: Recorder) -> dict[str, str]:
    """Merge the parties' own models once; returns the fingerprint by method."""
    settings, roster = config.secure_settings(), open_roster(config)
    base = base_folder(config.model)
    if base is None:
        raise ConfigError(
            f"model {config.model!r} is not on the server; a merge needs the public base there "
            "as a folder of safetensors"
        )
    if parse_drop_rate(config.drop_rate).p > ONE_SHOT_MOST:
        LOG.warning(
            "drop-rate %s in one shot with one mask for all costs accuracy; %g or less is safer",
            config.drop_rate,
            ONE_SHOT_MOST,
        )
    compile_patterns(config.exclude)
    out = recorder.folder / "merged"
    result = secure_merge(
        grid,
        base,
        roster,
        settings,
        run=str(config.seed),
        model=config.model,
        exclude=config.exclude,
        parties=config.min_clients,
        out=out if config.save_model else None,
        node_timeout=config.node_timeout,
        stage_seconds=config.secure_stage_seconds,
    )
    found = result.measurements
    write_json(recorder.folder / "secure.json", found)
    sent = [*found["upload_bytes"]]
    received = [*found["download_bytes"]]
    recorder.row(
        RunRow.of(
            found["method"],
            1,
            {},
            clients=len(found["parties"]),
            accepted=len(found["parties"]),
            rejected=found["rejected"],
            parameters=found["parameters"],
            update_bytes_per_client=sum(sent) // len(sent),
            dense_bytes_per_client=0,
            upload_bytes_per_client=sum(sent) // len(sent),
            download_bytes_per_client=sum(received) // len(received),
            upload_bytes=sum(sent),
            download_bytes=sum(received),
            secure_lone_share=found["lone_share"],
            secure_conflict_share=found["conflict_share"],
            secure_clipped_share=found["clipped_share"],
            secure_results=len(found["result_at"]),
            round_seconds=found["seconds"],
            seconds=found["seconds"],
        )
    )
    return {found["method"]: found["fingerprint"]}

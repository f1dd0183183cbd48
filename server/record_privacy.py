"""Privacy of records in the run config: with what it goes together, and what parties tell of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flwr.app import MetricRecord, RecordDict

from dare_agg.errors import ConfigError
from dare_agg.flower.metrics import mean_metrics, told_metrics
from dare_agg.merge.methods import find_method
from dare_agg.privacy.records import RecordPrivacy, statement

RECORDS = "records"
# What a party tells with its update, and a run's row and card of all parties: the most of any.
TOLD = ("privacy-epsilon", "privacy-delta", "privacy-noise")
_OF_CLIENTS = ("members", "quantile", "apart")


def check_record_run(config: Any, methods: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Refuse what breaks the promise of ``dp = "records"``; raises `ConfigError`."""
    for name in _OF_CLIENTS:
        if getattr(config, f"dp_{name}") != defaults[f"dp-{name}"]:
            raise ConfigError(
                f"dp-{name} with dp = {RECORDS!r}, which counts no clients: leave it out"
            )
    refusals: tuple[tuple[object, str], ...] = (
        (len(config.methods) > 1, f"and {len(config.methods)} methods, which would share one "
         "budget of each party: run them one by one"),
        (config.secure_merge, "with secure-merge, of models that were trained before: leave one "
         "of them out"),
        (config.early_stop, "with early-stop, which looks at losses without noise: leave it out, "
         "steps says how long a round is"),
        (config.packing, "with packing: several conversations share a row; leave packing out"),
        (config.precision == "float16", "with precision = float16, whose gradients overflow row "
         "by row: set precision = bfloat16 or float32"),
    )  # fmt: skip
    for bad, why in refusals:
        if bad:
            raise ConfigError(f"dp = {RECORDS!r} {why}")
    for name in config.methods:
        if found := find_method(methods[name]).statistics:
            raise ConfigError(
                f"dp = {RECORDS!r} with {name}: {found} statistics are made of the rows without "
                "noise; use a method without statistics, such as dare-task-arithmetic"
            )
    run_privacy(config)


def run_privacy(config: Any) -> RecordPrivacy:
    """What the run promises each party's rows; raises `ConfigError` for what is no promise."""
    return RecordPrivacy(
        epsilon=config.dp_epsilon,
        delta=config.dp_delta,
        clip=config.dp_clip,
        noise=config.dp_noise,
        weak=config.dp_weak,
    )


def largest_told(contents: list[RecordDict], weighted_by_key: str) -> MetricRecord:
    """The mean of the clients' metrics, and the most that any says of its privacy."""
    found = mean_metrics(contents, weighted_by_key)
    told = [told_metrics(content) for content in contents]
    for key in TOLD:
        if values := [one[key] for one in told if key in one]:
            found[key] = max(values)
    return found


def record_facts(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What a round's row says of the parties' budgets, from their metrics."""
    return {key.replace("-", "_"): metrics[key] for key in TOLD if key in metrics}


def promised_records(config: Any, told: Mapping[str, float]) -> dict[str, Any]:
    """What a model card says; ``told`` is the most that rows of the run said of each fact."""
    if config.dp != RECORDS:
        return {}
    found = {key.removeprefix("privacy_"): value for key, value in told.items()}
    unit = "a row of a party's training data; of a language model on texts: a block of them"
    return {"privacy": dict(statement(run_privacy(config), found, unit))}

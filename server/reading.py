"""A run config, read and checked before any node trains."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dare_agg.codec.formats import find_values
from dare_agg.codec.mask import parse_drop_rate
from dare_agg.downlink.ways import DOWNLINKS
from dare_agg.errors import ConfigError, did_you_mean
from dare_agg.files.app_config import absent_words
from dare_agg.rounds.auto import AUTO
from dare_agg.rounds.settings import check_weight_bound
from dare_agg.rounds.terms import UpdateTerms
from dare_agg.vectors.patterns import compile_patterns
from server.adapter_words import check_adapter_words, refuse_idle_words
from server.base_words import check_base_words
from server.buffer_words import check_buffer_words
from server.compared import METHODS
from server.config import DEFAULTS, RunConfig, kebab
from server.direction_words import check_directions_words
from server.privacy import check_privacy_words
from server.robust_words import check_robust_words
from server.secure_words import check_secure_words
from server.several import check_several, is_several


def read_config(raw: Mapping[str, Any]) -> RunConfig:
    """Check a run config; raises `ConfigError` naming the first key that is wrong."""
    try:
        config = RunConfig.model_validate(settled({**DEFAULTS, **raw}))
    except ValidationError as error:
        raise ConfigError(_said(error)) from error
    whole = {**DEFAULTS, **raw}
    if is_several(whole):
        check_several(whole, lambda own: read_config({**raw, **own}))
        return config
    for name in config.methods:
        if name not in METHODS:
            raise ConfigError(f"methods: {name!r} is unknown{did_you_mean(name, METHODS)}")
    if not config.methods:
        raise ConfigError("methods is empty; name at least one, for example dare-task-arithmetic")
    if config.downlink not in DOWNLINKS:
        raise ConfigError(
            f"downlink {config.downlink!r} is unknown{did_you_mean(config.downlink, DOWNLINKS)}"
        )
    if config.resume and not (config.output and config.keep_state):
        raise ConfigError("resume needs output, the folder of the run, and keep-state = true")
    check_secure_words(config, DEFAULTS)
    merges = config.merges()
    check_privacy_words(config, merges, DEFAULTS)
    check_base_words(config)
    check_adapter_words(config)
    if not config.resume:  # a run begun with such words goes on
        refuse_idle_words(raw, DEFAULTS, {config.train_by(name) for name in config.methods})
    check_directions_words(
        raw, DEFAULTS, {merge: config.train_by(name) for name, merge in merges.items()}
    )
    if config.drop_rate != AUTO:
        parse_drop_rate(config.drop_rate)
    config.step()
    config.budget()
    check_weight_bound(config.weight_bound)
    check_robust_words(config, merges)
    check_buffer_words(config, merges, DEFAULTS)
    if config.values != AUTO:
        find_values(config.values)
    find_values(config.dense_values)
    compile_patterns([*config.dense, *config.exclude])
    if config.partition == "column" and not config.partition_by:
        raise ConfigError('partition = "column" needs partition-by, the name of a column')
    return config


def settled(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The config with those of ``drop-rate`` and ``values`` settled that no round can choose.

    A secure run's server sees sums alone, whose noise it cannot judge; adapters are small, and all
    of them travels (docs/RESULTS.md, "Text, and LoRA": in one bit a value a drop of factors costs
    more rounds than it saves bytes).
    """
    if is_several(raw):  # each row settles its own
        return dict(raw)
    rate, values = raw["drop-rate"], raw["values"]
    if rate == AUTO and raw["secure"]:
        rate = "0.9"
    elif rate == AUTO and raw["train"] == "lora":
        rate = "0"
    if rate != AUTO and values == AUTO:
        values = UpdateTerms.values
    return {**raw, "drop-rate": rate, "values": values}


def _said(error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"][:1])
    absent = absent_words(Path(__file__).resolve().parents[1])
    if key in absent:
        return f"run config key {key!r}: {absent[key]}"
    if first["type"] == "extra_forbidden":
        known = [kebab(name) for name in RunConfig.model_fields]
        return f"run config key {key!r} is unknown{did_you_mean(key, known)}"
    return f"run config {key} = {first['input']!r}: {first['msg']}"

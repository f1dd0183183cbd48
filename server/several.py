"""Several drop rates or value formats in one run: each is a row, checked as a run of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dare_agg.errors import ConfigError
from dare_agg.runs.variants import WHOLE, Variant, listed, variants
from server.config import RunConfig, kebab

MOST_ROWS = 32
_LISTS = ("drop-rate", "values")


def is_several(raw: Mapping[str, Any]) -> bool:
    """Whether a whole run config names several drop rates or formats."""
    return any(len(listed(raw[key])) > 1 for key in _LISTS)


def check_several(raw: Mapping[str, Any], check: Callable[[dict[str, Any]], object]) -> None:
    """Check each row as a run of its own by ``check``; ``raw`` is a whole run config.

    Raises `ConfigError` for what cannot have several rows.
    """
    refusals = (
        (raw["secure"], "with secure, whose sums have one mask: run them one by one"),
        (raw["dp"], "with dp, whose budget is of one model: run them one by one"),
        (raw["upload-budget"] or raw["upload-seconds"],
         "with an upload budget, which chooses them: leave one of the two out"),
        (all(one.method in WHOLE for one in variants(raw)),
         f"and methods that send every value ({raw['methods']}): add one that drops, such as "
         "dare-ties"),
    )  # fmt: skip
    for key in _LISTS:
        words = listed(raw[key])
        if len(set(words)) < len(words):
            raise ConfigError(f"{key} = {raw[key]!r} names one twice; name each once")
        for bad, why in refusals:
            if bad and len(words) > 1:
                raise ConfigError(f"{key} = {raw[key]!r} {why}")
    if (count := len(variants(raw))) > MOST_ROWS:
        raise ConfigError(f"{count} rows in one run; at most {MOST_ROWS}: run them apart")
    for rate in listed(raw["drop-rate"]):
        for values in listed(raw["values"]):
            check({"drop-rate": rate, "values": values})


def rows_of(
    config: RunConfig, settled: Callable[[dict[str, Any]], dict[str, Any]]
) -> Iterator[tuple[Variant, RunConfig]]:
    """Each row of a run, with the config that it has alone."""
    raw = config.model_dump(by_alias=True)
    for one in variants(raw):
        own = settled({**raw, "drop-rate": one.drop_rate, "values": one.values})
        update = {name: own[kebab(name)] for name in ("drop_rate", "values")}
        yield one, config.model_copy(update=update)

"""The run config's words of a buffer, checked before anything is started."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dare_agg.codec.mask import parse_drop_rate
from dare_agg.errors import ConfigError, refuse
from dare_agg.robust.rule import check_robust
from dare_agg.rounds.arrivals import read_events
from dare_agg.rounds.auto import AUTO
from dare_agg.rounds.buffer import BufferSettings
from dare_agg.rounds.buffered import check_buffered
from dare_agg.rounds.settings import FederatedSettings
from dare_agg.rounds.terms import UpdateTerms
from dare_agg.runs.variants import variants
from server.compared import METHODS

if TYPE_CHECKING:
    from server.config import RunConfig

_OTHERS = ("staleness", "max_staleness", "arrivals")


def buffer_settings(config: RunConfig, state: Path) -> BufferSettings | int:
    """The buffer of a method whose state is kept in ``state``; 0 for rounds."""
    if not config.buffer:
        return 0
    return BufferSettings(
        config.buffer,
        config.staleness,
        config.max_staleness,
        record=state / "buffer" if config.keep_state else "",
        arrivals=config.arrivals,
    )


def check_buffer_words(
    config: RunConfig, merges: Mapping[str, str], defaults: Mapping[str, Any]
) -> None:
    """Refuse what a buffer cannot be or do; ``merges`` are the merge methods compared, by name."""
    if not config.buffer:
        for word in _OTHERS:
            key = word.replace("_", "-")
            if getattr(config, word) != defaults[key]:
                raise ConfigError(
                    f"{key} = {getattr(config, word)!r} without buffer: rounds wait for all who "
                    "are asked, and no update is older than another; set buffer, or leave it out"
                )
        return
    settings = BufferSettings(config.buffer, config.staleness, config.max_staleness)
    rows = len(variants(config.model_dump(by_alias=True))) if config.arrivals else 1
    refusals = (
        (config.secure, "with secure: a sum needs all its parties on one version and one mask, and "
         "what hides one is taken away by the others in the same sum; leave buffer out"),
        (config.dp == "clients", "with dp = clients: its accounting rests on draws that say who is "
         "in which release, and in a buffer speed says it, which others see; leave buffer out, or "
         "set dp = records, which each client keeps by itself"),
        (config.lora_merge == "product", "with lora-merge = product: products of adapters that "
         "were trained from several versions have no one version to be told from; set lora-merge "
         "= factors"),
        (config.min_replies > config.buffer, f"and min-replies = {config.min_replies}: a merge has "
         f"{config.buffer} updates; lower min-replies"),
        (rows > 1, f"and arrivals with {rows} rows: a record is of one of them; run them one by "
         "one"),
    )  # fmt: skip
    refuse(refusals, f"buffer = {config.buffer}")
    settings.check_clients(
        config.min_clients,
        f"set min-clients to {config.buffer} or more (--clients in a simulation), or lower buffer",
    )
    rule = check_robust(config.robust, config.byzantine)
    for name, method in merges.items():
        rate = METHODS[name].words.get("drop_rate", config.drop_rate)
        terms = UpdateTerms(keep_rates=config.keep_rates, mask=config.mask)
        found = FederatedSettings(terms, method=method, robust=rule)
        check_buffered(found, settings, drop_rate=None if rate == AUTO else parse_drop_rate(rate))
    if config.arrivals:
        read_events(Path(config.arrivals))

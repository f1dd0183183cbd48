"""Words of secure sums: what a run whose server sees sums alone cannot keep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dare_agg.errors import ConfigError, did_you_mean, refuse
from dare_agg.secure.aggregates import SECURE_METHODS
from server.field_types import split_words

if TYPE_CHECKING:
    from server.config import RunConfig


def check_secure_words(config: RunConfig, usual: Mapping[str, Any]) -> None:
    """Refuse what a secure run cannot keep; the sums' own settings are checked with them."""
    if not config.secure:
        if config.secure_merge:
            raise ConfigError(
                f"secure-merge without secure; set secure to one of {', '.join(SECURE_METHODS)}"
            )
        return
    refusals = (
        (config.secure not in SECURE_METHODS, f"secure = {config.secure!r} is unknown"
         f"{did_you_mean(config.secure, SECURE_METHODS)}"),
        (config.methods != split_words(usual["methods"]),
         "methods beside secure; secure names the method"),
        (config.mask != "stratified", f"mask = {config.mask!r} with secure; stratified is summed"),
        (config.keep_rates == "own", "keep-rates = 'own' with secure; its sums keep the same "
         "elements of all: set last"),
        (config.secure_merge and config.keep_rates != "uniform", f"keep-rates = "
         f"{config.keep_rates!r} in a one-shot merge, which has no round before: leave it out"),
        (config.secure_merge and config.downlink != usual["downlink"],
         f"downlink = {config.downlink!r} in a one-shot merge, which sends no model: leave it out"),
        (config.budget() is not None, "an upload budget with secure; all parties share one mask: "
         "set drop-rate"),
        (config.keep_optimizer, "keep-optimizer with secure; moments of a round without a sum "
         "would show single deltas in the next: leave it out"),
        (bool(config.lora_ranks), "lora-ranks with secure; what some parties do not learn is the "
         "others' alone in a sum: leave it out"),
        (config.secure_merge and config.secure_groups > 1, f"secure-groups = "
         f"{config.secure_groups} in a one-shot merge, whose parties take one sum: leave it out"),
        (config.resume and config.secure_merge, "resume of a one-shot merge; start it anew"),
    )  # fmt: skip
    refuse(refusals)
    if not config.secure_roster:
        raise ConfigError("secure needs secure-roster, a file of dare-agg keys roster")
    config.secure_settings()

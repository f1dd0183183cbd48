"""The run config's words of Byzantine clients, checked before anything is started."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dare_agg.errors import ConfigError, refuse
from dare_agg.flower.secure.groups import check_rule_of_groups
from dare_agg.robust.rule import check_robust
from dare_agg.rounds.settings import ROBUST_METHODS

if TYPE_CHECKING:
    from server.config import RunConfig


def check_robust_words(config: RunConfig, methods: dict[str, str]) -> None:
    """Raise `ConfigError` for a rule that cannot be, or that the rest of the config cannot keep.

    ``methods`` are the merge methods of those that are compared, by name.
    """
    rule = check_robust(config.robust, config.byzantine)
    if config.secure:
        check_rule_of_groups(config.secure_groups, rule)
    elif config.secure_groups > 1:
        raise ConfigError(
            f"secure-groups = {config.secure_groups} without secure; set secure = mean, whose sums "
            "they are, or leave it out"
        )
    if rule is None:
        return
    named = f"robust = {config.robust!r}"
    other = [name for name, method in methods.items() if method not in ROBUST_METHODS]
    refusals = (
        (config.secure and config.fraction_train < 1, f"{named} with secure and fraction-train = "
         f"{config.fraction_train}: sums of a group whose members come and go show single ones; "
         "leave fraction-train at 1"),
        (config.lora_merge == "product", f"{named} with lora-merge = product, which makes one "
         "update of all before the rule sees them; set lora-merge = factors"),
        (other and not rule.bounds_only, f"{named} with {', '.join(other)}: the rule takes the "
         "place of a mean; compare dare-task-arithmetic, dare-average or fedavg"),
        (rule.votes and config.keep_rates != "uniform" and not config.secure,
         f"{named} compares the same elements of "
         f"all clients, and keep-rates = {config.keep_rates} keep others of each; leave it out"),
        (rule.votes and config.upload_seconds, f"{named} needs one drop rate for all clients, and "
         "upload-seconds gives each its own; set drop-rate, or upload-budget alone"),
        (rule.beta and config.base, f"{named} with base: momentum keeps a whole model for every "
         "client in memory; leave momentum out"),
    )  # fmt: skip
    refuse(refusals)
    if config.secure:  # it compares groups, not clients
        return
    if config.buffer:  # as many as a merge has
        return
    fewest = max(int(config.min_clients * config.fraction_train), min(config.min_clients, 2))
    rule.check_clients(fewest, "raise min-clients (--clients in a simulation) or fraction-train")

"""Words of adapters: refused where none is trained, or where the rest cannot keep them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from dare_agg.errors import ConfigError, refuse
from dare_agg.merge.methods import MEANS
from dare_agg.rounds.step import server_step

if TYPE_CHECKING:
    from server.config import RunConfig


def refuse_idle_words(
    raw: Mapping[str, Any], usual: Mapping[str, Any], trained: Collection[str]
) -> None:
    """Raise `ConfigError` for ``lora-`` words, told otherwise than ``usual``, that nothing heeds.

    ``trained`` is what the run's methods train.
    """
    if "lora" in trained:
        return
    idle = sorted(k for k in raw if k.startswith("lora-") and k in usual and raw[k] != usual[k])
    if idle:
        does = " and ".join(sorted(set(trained)))
        them = "them" if len(idle) > 1 else "it"
        raise ConfigError(
            f"{', '.join(idle)}, and train = {does} trains no adapters; set train = lora, or leave "
            f"{them} out"
        )


def check_adapter_words(config: RunConfig) -> None:
    """Refuse ranks and merges of adapters that the rest of the config cannot keep."""
    odd = [r for r in config.lora_ranks if not (r.isdecimal() and 1 <= int(r) <= config.lora_rank)]
    if odd:
        raise ConfigError(
            f"lora-ranks: {odd[0]!r} is no rank from 1 to {config.lora_rank}, the run's lora-rank, "
            "which all clients' adapters have; raise that, or lower this"
        )
    if config.lora_merge != "product":
        return
    refusals = (
        (config.secure, "lora-merge = product with secure: a server that sees sums alone cannot "
         "multiply single factors; leave it out"),
        (not any(config.train_by(name) == "lora" for name in config.methods),
         f"lora-merge = product, and train = {config.train} trains no adapters; set train = lora"),
        (config.scaling != 1, f"lora-merge = product with scaling {config.scaling:g}, which would "
         "scale factors; leave scaling at 1"),
        (config.step() != server_step(), f"lora-merge = product with server-step "
         f"{config.server_step!r}, which would step along factors; leave it plain, at rate 1"),
    )  # fmt: skip
    refuse(refusals)
    for name, merge in config.merges().items():
        if config.train_by(name) == "lora" and merge not in MEANS:
            raise ConfigError(
                f"lora-merge = product with {name}: the mean of products is a merge by itself; "
                "use dare-task-arithmetic, dare-average or fedavg, or lora-merge = factors"
            )

"""Words of adapters in a run that trains none: said, rather than passed over."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from dare_agg.errors import ConfigError


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

"""Words of directions: refused where nothing merges by them, or adapters would."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dare_agg.errors import ConfigError

_MERGES = "wudi"


def check_directions_words(
    raw: Mapping[str, Any], usual: Mapping[str, Any], trained: Mapping[str, str]
) -> None:
    """Raise `ConfigError` for words that nothing heeds, and for adapters merged by directions.

    ``trained`` is what is trained by merge method.
    """
    idle = sorted(
        key for key in ("directions", "direction-bits") if raw.get(key, usual[key]) != usual[key]
    )
    if idle and _MERGES not in trained:
        raise ConfigError(
            f"{', '.join(idle)}, and no method merges by directions; add dare-wudi to methods, or "
            "leave them out"
        )
    if trained.get(_MERGES) == "lora":
        raise ConfigError(
            "dare-wudi with train = lora: factors of adapters are no Linears whose inputs their "
            "changes span; set train = full, or merge by dare-task-arithmetic"
        )

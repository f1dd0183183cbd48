"""The paper's check of the deltas' range, and which base the models themselves name."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dare_agg.errors import NonFiniteError
from dare_agg.files.json_text import read_bounded, read_json
from dare_agg.offline.adapters.folder import CONFIG_NAME
from dare_agg.offline.diagnose import diagnose_deltas
from dare_agg.offline.opening import OpenedModel
from dare_agg.offline.recipe import Recipe
from dare_agg.offline.yaml_text import parse_yaml
from dare_agg.vectors.layout import layout_of
from dare_agg.vectors.sources import array_source, take

# Elements of a model, and of all of them, looked at, in runs of neighbours.
_CHECKED, _CHECKED_IN_ALL, _RUN = 1 << 16, 1 << 19, 256
_MOST_CARD_BYTES = 4 << 20


def range_warnings(opened: list[OpenedModel], recipe: Recipe) -> list[str]:
    """The paper's check of the deltas' range, on an even sample of up to 2^16 elements.

    Whole models need no base that they were tuned from; nothing is said of them.
    Updates are left out: they hold what survived, rescaled, and were checked when opened.
    Raises `NonFiniteError` where the sample is not finite (adapters).
    """
    dense = [m for m in opened if m.kind != "update"]
    if not dense:
        return []
    size = opened[0].source.size
    count = min(size, _CHECKED, max(_RUN, _CHECKED_IN_ALL // len(dense)))
    starts = (
        np.arange(-(-count // _RUN), dtype=np.int64)
        * (size - min(_RUN, size))
        // max(1, -(-count // _RUN) - 1)
    )
    # In a small model the runs overlap; positions must ascend.
    blocks = np.unique(starts[:, None] + np.arange(min(_RUN, size)))
    samples = []
    for model in dense:
        picked = take(model.source, blocks)
        if not np.isfinite(picked).all():
            raise NonFiniteError(f"{model.given}: its delta is not finite; train it again")
        samples.append(array_source(picked))
    if recipe.is_of_whole_models:
        return []
    names = [str(model.given) for model in dense]
    found = diagnose_deltas(layout_of({"sample": (blocks.size,)}), samples, names=names)
    warnings = list(found.warnings)
    if any("nearer to each other" in warning for warning in warnings):
        warnings += filter(None, [bases_named_by([model.given.path for model in dense])])
    if not recipe.drops:
        return [w for w in warnings if "unsafe" not in w]
    return warnings


def bases_named_by(paths: Sequence[Path]) -> str:
    """Say which bases the models' own files name; empty where they name none."""
    named: dict[str, list[str]] = {}
    for path in paths:
        for base in _named_bases(path):
            named.setdefault(base, []).append(path.name)
    told = [f"{base!r} ({', '.join(models)})" for base, models in sorted(named.items())]
    return f"the models' own files name as base: {'; '.join(told)}" if told else ""


def _named_bases(path: Path) -> set[str]:
    found: set[str] = set()
    for file, keys in (
        (CONFIG_NAME, ("base_model_name_or_path",)),
        ("config.json", ("base_model", "_name_or_path")),
    ):
        with contextlib.suppress(OSError, ValueError):
            values = read_json(path / file)
            found |= {
                str(values[key]) for key in keys if isinstance(values, dict) and values.get(key)
            }
    with contextlib.suppress(OSError, ValueError):
        # The YAML head of a model card.
        text = read_bounded(path / "README.md", _MOST_CARD_BYTES).decode()
        _, head, _ = text.split("---", 2)
        card = parse_yaml(head)
        bases = card.get("base_model") if isinstance(card, dict) else None
        found |= {str(base) for base in ([bases] if isinstance(bases, str) else bases or ())}
    return {base for base in found if base not in (str(path), path.name)}

"""The table of weights in bfloat16: what each kind of rounding leaves of what float32 learns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from simulations.pages.tables import by_cell, markdown, mean_and_interval, shown

_BASE, _WHOLE = "untouched base", "float32"


def weights_table(rows: Sequence[dict[str, Any]]) -> str:
    """Accuracy and loss by cell, and the share of float32's gain in loss, on the same seeds."""
    cells = by_cell(rows)
    lines = []
    for cell, own in cells.items():
        model, kind = _parts(cell)
        share = "–"
        if kind not in (_BASE, _WHOLE):
            base, whole = (_losses(cells, model, kind) for kind in (_BASE, _WHOLE))
            found = _losses(cells, model, kind)
            shares = [
                (base[seed] - found[seed]) / (base[seed] - whole[seed])
                for seed in found
                if seed in base and seed in whole
            ]
            share = shown(shares) if shares else "–"
        loss, _ = mean_and_interval([row["curve"][-1]["loss"] for row in own])
        accuracy = shown([row["accuracy"] for row in own])
        lines.append((cell, accuracy, f"{loss:.3f}", share, str(len(own))))
    return markdown(("Weights", "Accuracy, %", "Loss", "Gain in loss kept, %", "Seeds"), lines)


def _parts(cell: str) -> tuple[str, str]:
    model, _, kind = cell.rpartition(", ")
    return model, kind


def _losses(cells: dict[str, Any], model: str, kind: str) -> dict[int, float]:
    name = f"{model}, {kind}" if model else kind
    return {row["seed"]: row["curve"][-1]["loss"] for row in cells.get(name, ())}

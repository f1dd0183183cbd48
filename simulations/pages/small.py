"""Two small tables: secure rounds by keep rates, and survivors that learn alone in rounds."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from simulations.pages.tables import Rows, by_cell, markdown, shown

_KEEP = ("uniform", "last")


def secure_rates_table(rows: Rows) -> str:
    """Accuracy and the merged step's error of either keep rates, paired by seed."""
    cells: dict[str, dict[int, dict[str, Mapping[str, Any]]]] = defaultdict(dict)
    for row in rows:
        of_seed = cells[row["cell"].rpartition(", ")[0]].setdefault(row["seed"], {})
        of_seed[row["keep_rates"]] = row
    lines = []
    for cell, seeds in cells.items():
        pairs = [[own[k] for k in _KEEP] for _, own in sorted(seeds.items()) if len(own) == 2]
        if not pairs:
            continue
        scores = [[row["accuracy"] for row in pair] for pair in pairs]
        # The first round is uniform in both.
        errors = [[math.fsum(row["errors"][1:]) for row in pair] for pair in pairs]
        ratio = math.fsum(last / uniform for uniform, last in errors) / len(errors)
        means = [shown([pair[k] for pair in scores]) for k in (0, 1)]
        gains = shown([last - uniform for uniform, last in scores], signed=True)
        words = max(max(last["words"]) / min(uniform["words"]) for uniform, last in pairs)
        lines.append((cell, *means, gains, f"{ratio:.2f}", f"{words:.3f}", str(len(pairs))))
    columns = (
        "Sum",
        "uniform, %",
        "last, %",
        "last minus uniform, points",
        "error of the step, last / uniform",
        "words up, the same at most",
        "Seeds",
    )
    return markdown(columns, lines)


def learned_rounds_table(rows: Rows) -> str:
    """Accuracy by way, and what it is above DARE of the same task and drop rate."""
    cells = by_cell(rows)
    lines = []
    for cell, own in cells.items():
        rival = {r["seed"]: r["accuracy"] for r in cells.get(f"{cell.split(': ')[0]}: DARE", [])}
        gaps = [r["accuracy"] - rival[r["seed"]] for r in own if r["seed"] in rival]
        told = "–" if cell.endswith(": DARE") or not gaps else shown(gaps, signed=True)
        nbytes = f"{own[0]['bytes']:,}"
        lines.append((cell, nbytes, shown([r["accuracy"] for r in own]), told, str(len(own))))
    columns = ("Way", "Bytes up a client and round", "Accuracy, %", "minus DARE, points", "Seeds")
    return markdown(columns, lines)

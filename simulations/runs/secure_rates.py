"""Secure rounds whose keep rates follow the last merged change, beside one rate for all tensors.

``python -m simulations.runs.secure_rates [--seeds 0 1 2] [--limit N]`` runs the rounds of
`simulations.runs.secure_tasks` (four parties, four tasks, one encoder, the whole protocol) at equal
bytes with either, and appends to ``simulations/results/secure_rates.jsonl``; rows that are there
are skipped.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from simulations.runs.rows import RESULTS, append_row, read_rows, versions
from simulations.runs.secure_tasks import rounds

OUT = RESULTS / "secure_rates.jsonl"
CELLS = (("task-arithmetic", "0.99"), ("task-arithmetic", "0.999"), ("ties", "0.99"))
KEEP = ("uniform", "last")


def run(seeds: Sequence[int], limit: int) -> int:
    names = ("method", "drop_rate", "keep_rates", "seed")
    done = {tuple(row[name] for name in names) for row in read_rows(OUT)}
    cells = [
        dict(zip(names, (method, rate, keep, seed), strict=True))
        for method, rate in CELLS
        for seed in seeds
        for keep in KEEP
        if (method, rate, keep, seed) not in done
    ]
    for cell in cells[: limit or None]:
        began = time.process_time()
        measured = rounds({**cell, "masks": "secure"})
        seconds = round(time.process_time() - began, 1)
        append_row(OUT, {**cell, **measured, "cpu_seconds": seconds, "versions": versions()})
        print(*cell.values(), file=sys.stderr)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m simulations.runs.secure_rates", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--limit", type=int, default=0, help="rows at most (0: all)")
    options = parser.parse_args()
    return run(options.seeds, options.limit)


if __name__ == "__main__":
    sys.exit(main())

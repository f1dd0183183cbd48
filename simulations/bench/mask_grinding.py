"""How many elements a malicious server can have in a secure sum's mask by trying out who "shared".

``python -m simulations.bench.mask_grinding [--json]``: once it holds the opened nonces, a server
may name any subset of the parties, from the threshold up, as those who shared keys. Each subset
gives another mask. Here it wants the first elements of a list kept, tries subset after subset
with the library's own digests and masks, and keeps the best. Writes
``results/mask_grinding.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from dare_agg.codec.mask import parse_drop_rate
from dare_agg.secure.messages import NONCE_BYTES, shares_digest
from dare_agg.secure.terms import SecureTerms, secure_terms
from simulations.runs.rows import RESULTS, append_row, read_rows, versions

DROP_RATES = ("0.5", "0.9")
PARTIES = 20
TRIES = (100, 1_000, 10_000)
SESSIONS = 20
SIZE = 100_000
WANTED = range(500, SIZE, 1000)  # each in a stratum of its own
COHORTS = (4, 10, 20, 100)


def subsets(parties: int, threshold: int) -> Iterator[tuple[int, ...]]:
    """Who may have shared: all, then all but one, down to the threshold."""
    for left_out in range(parties - threshold + 1):
        for out in combinations(range(1, parties + 1), left_out):
            yield tuple(p for p in range(1, parties + 1) if p not in out)


def choices(parties: int, threshold: int) -> int:
    """How many masks a server can choose from in one session."""
    return sum(math.comb(parties, k) for k in range(threshold, parties + 1))


def predicted(tries: int, stride: float) -> float:
    """log(tries)/log(stride): every further element halves, or tenths, the masks that fit."""
    return math.log(tries) / math.log(stride)


def terms_of(drop_rate: str, parties: int = PARTIES) -> SecureTerms:
    """Terms of a sum of so many parties."""
    return secure_terms(
        run="bench",
        round_number=1,
        roster=bytes(32),
        cohort=range(1, parties + 1),
        base="0" * 64,
        layout="0" * 64,
        size=SIZE,
        drop_rate=parse_drop_rate(drop_rate),
    )


def grind(terms: SecureTerms, seed: int, tries: tuple[int, ...]) -> list[int]:
    """The most elements from the top of `WANTED` that one mask keeps, after so many tries."""
    rng = np.random.default_rng([seed, 80])
    nonces = {party: rng.bytes(NONCE_BYTES) for party in terms.cohort}
    keys = rng.bytes(32)
    best, reached = 0, []
    for number, shared in enumerate(subsets(len(terms.cohort), terms.threshold), start=1):
        mask = terms.mask(shares_digest(keys, tuple((p, nonces[p]) for p in shared)))
        kept = 0
        while kept < len(WANTED) and mask.indices(WANTED[kept], WANTED[kept] + 1).size:
            kept += 1
        best = max(best, kept)
        if number in tries:
            reached.append(best)
        if number >= tries[-1]:
            break
    return reached


def run(out: Path) -> list[dict[str, Any]]:
    """Measure what is missing of the results file; returns all rows."""
    done = {row["drop_rate"] for row in read_rows(out)}
    for drop_rate in DROP_RATES:
        if drop_rate in done:
            continue
        terms = terms_of(drop_rate)
        found = np.array([grind(terms, seed, TRIES) for seed in range(SESSIONS)])
        stride = terms.drop_rate.numerator / terms.drop_rate.denominator
        for column, tries in enumerate(TRIES):
            row = {
                "drop_rate": drop_rate,
                "parties": PARTIES,
                "sessions": SESSIONS,
                "tries": tries,
                "chosen": round(float(found[:, column].mean()), 2),
                "least": int(found[:, column].min()),
                "most": int(found[:, column].max()),
                "predicted": round(predicted(tries, stride), 2),
            }
            append_row(out, {**row, "versions": versions()})
    return read_rows(out)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m simulations.bench.mask_grinding", description=__doc__
    )
    parser.add_argument("--json", action="store_true", help="print the rows as one JSON object")
    parser.add_argument("--out", type=Path, default=RESULTS / "mask_grinding.jsonl")
    options = parser.parse_args()
    rows = run(options.out)
    if options.json:
        print(json.dumps({"rows": rows}))
        return
    for row in rows:
        print(
            f"p={row['drop_rate']:4} {row['tries']:7,} tries: {row['chosen']:5.2f} elements chosen "
            f"({row['least']} to {row['most']} in {row['sessions']} sessions), "
            f"log(tries)/log(stride) = {row['predicted']:.2f}"
        )
    for parties in COHORTS:
        threshold = terms_of("0.5", parties).threshold
        count = choices(parties, threshold)
        print(f"{parties} parties, threshold {threshold}: 2^{math.log2(count):.1f} masks a session")


if __name__ == "__main__":
    main()

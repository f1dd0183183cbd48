"""Reference results of robust rules by byzfl 0.0.11, for tests/robust/test_oracle.py.

    python3 -m venv byz && byz/bin/pip install byzfl==0.0.11
    byz/bin/python scripts/robust_vectors.py > tests/data/robust/byzfl.json

In an environment of its own: byzfl brings torch along, and nothing of it is needed to test.
"""

import json
import sys
from importlib.metadata import version

import byzfl
import numpy as np

# byzfl's Krum counts the n−f−1 nearest others.
NEAREST = 8
F, CLIENTS, ELEMENTS = 2, 11, 12


def rules():
    """What the library calls a rule → byzfl's objects, new ones: some keep their last result."""
    return {
        "median": [byzfl.Median()],
        "trimmed-mean": [byzfl.TrMean(f=F)],
        "geometric-median(steps=7)": [byzfl.GeometricMedian(nu=1e-9, T=7)],
        "geometric-median": [byzfl.GeometricMedian(nu=1e-9, T=32)],
        f"krum(near={NEAREST})": [byzfl.Krum(f=F)],
        f"multi-krum(near={NEAREST})": [byzfl.MultiKrum(f=F)],
        "centered-clipping(steps=1, radius=2)": [byzfl.CenteredClipping(L=1, tau=2.0)],
        "centered-clipping(steps=5, radius=2)": [byzfl.CenteredClipping(L=5, tau=2.0)],
        "nnm+trimmed-mean": [byzfl.NNM(f=F), byzfl.TrMean(f=F)],
        "nnm+median": [byzfl.NNM(f=F), byzfl.Median()],
        "nnm+geometric-median": [byzfl.NNM(f=F), byzfl.GeometricMedian(nu=1e-9, T=32)],
        f"nnm+krum(near={NEAREST})": [byzfl.NNM(f=F), byzfl.Krum(f=F)],
        "norm-bound(limit=3)+nnm+trimmed-mean": [
            byzfl.Clipping(c=3.0), byzfl.NNM(f=F), byzfl.TrMean(f=F),
        ],
    }  # fmt: skip


def main() -> None:
    """Write vectors of three kinds and what byzfl makes of them."""
    draw = np.random.default_rng(20)
    honest = draw.normal(0.3, 1, (CLIENTS, ELEMENTS))
    loud, copied = honest.copy(), honest.copy()
    loud[-F:] *= -30
    copied[-F:] = copied[0]
    found = {"byzfl": version("byzfl"), "f": F, "cases": []}
    for name, vectors in {"honest": honest, "loud": loud, "copied": copied}.items():
        # Deltas are float32.
        vectors = vectors.astype(np.float32).astype(np.float64)
        results = {}
        for rule, parts in rules().items():
            result = vectors.copy()
            for part in parts:
                result = part(result)
            results[rule] = result.tolist()
        found["cases"].append({"name": name, "vectors": vectors.tolist(), "results": results})
    json.dump(found, sys.stdout, indent=0)
    print()


if __name__ == "__main__":
    main()

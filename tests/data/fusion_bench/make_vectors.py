"""How the vectors beside this file were made: FusionBench 0.2.33 on small models drawn here.

    python -m venv ENV && ENV/bin/pip install fusion-bench==0.2.33 torch==2.13.0
    ENV/bin/python tests/data/fusion_bench/make_vectors.py

Its Iso-C and TSV-M are deterministic. WUDI there is 300 steps of Adam on the objective whose
minimum is known: the test asks that none undercuts it. KnOTS there is the shared basis alone.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from fusion_bench.method.isotropic_merging.iso_utils import iso_c
from fusion_bench.method.knots.knots_utils import subspace_alignment
from fusion_bench.method.task_singular_vector.utils.TSVM_utils import (
    compute_and_sum_svd_mem_reduction,
)
from fusion_bench.method.wudi.wudi import wudi_merging

SHAPES = {"up.weight": (20, 12), "down.weight": (9, 24), "square.weight": (16, 16), "b.bias": (7,)}
MODELS = 3


def main() -> None:
    """Entry point."""
    torch.manual_seed(0)
    rng = np.random.default_rng(3)
    vectors = [
        {
            name: torch.from_numpy((rng.standard_normal(shape) * 1e-2).astype(np.float32))
            for name, shape in SHAPES.items()
        }
        for _ in range(MODELS)
    ]
    wide = [{name: tensor.double() for name, tensor in vector.items()} for vector in vectors]
    arrays = {
        f"deltas/{number}/{name}": tensor.numpy()
        for number, vector in enumerate(vectors)
        for name, tensor in vector.items()
    }
    found = {
        "iso-c": iso_c(wide, accelerator="cpu"),
        "tsv-m": compute_and_sum_svd_mem_reduction(wide, accelerator="cpu"),
        "wudi": wudi_merging(wide, accelerator="cpu", iter_num=300),
    }
    for method, merged in found.items():
        for name, tensor in merged.items():
            arrays[f"{method}/{name}"] = tensor.detach().numpy()
    for name, shape in SHAPES.items():
        if len(shape) == 2:
            basis, sizes, rows = subspace_alignment([vector[name] for vector in wide])
            arrays[f"knots/{name}/basis"] = basis.numpy()
            for number, part in enumerate(rows):
                arrays[f"knots/{name}/{number}"] = (sizes[:, None] * part).numpy()
    np.savez_compressed(Path(__file__).parent / "vectors.npz", **arrays)


if __name__ == "__main__":
    main()

"""Make the vectors of tests/data/mergekit_files: what mergekit makes of the files, and its inputs.

    python -m simulations.bench.mergekit_files.vectors PYTHON tests/data/mergekit_files/vectors.npz

``in/MODEL`` and ``out/DTYPE/FILE`` (over models of that dtype) are all of a model's tensors behind
one another, by name; 16-bit ones of OUT as their bits. ``rounding/DTYPE/FILE`` says how many units
mergekit's float32 OUT is from its float64 one.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import yaml

from dare_agg.checkpoint import open_checkpoint
from simulations.bench.mergekit_files.__main__ import FILES, RANDOM, out_dtype
from simulations.bench.mergekit_files.compare import units
from simulations.bench.mergekit_files.models import Size, draw_models, write_models
from simulations.bench.mergekit_files.oracle import Mergekit

# Files of a few KB.
SMALL = Size(hidden=4, inner=6, heads=2, vocabulary=8, rank=2)
# Over bfloat16 models too: where equal magnitudes and sums of zero are common.
ALSO_16_BIT = ("linear-no-dtype", "slerp-slices", "ties", "ties-gradient", "breadcrumbs", "sce")


def stored(path: Path) -> np.ndarray:
    """All tensors of a model as they are stored, behind one another."""
    model = open_checkpoint(path)
    return np.concatenate([np.asarray(model.raw(name)) for name in sorted(model.names)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("python", help="Python of an environment with mergekit")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    drawn = draw_models(SMALL)
    found = {
        f"in/{name}": np.concatenate([arrays[n].ravel() for n in sorted(arrays)])
        for name, arrays in drawn.items()
    }
    with tempfile.TemporaryDirectory() as work, Mergekit(arguments.python, Path(work)) as mergekit:
        for dtype in ("float32", "bfloat16"):
            folder = Path(work) / dtype
            write_models(folder, dtype, drawn, SMALL)
            for file in sorted(FILES.glob("*.yaml")):
                config = yaml.safe_load(file.read_text())
                skipped = dtype != "float32" and file.stem not in ALSO_16_BIT
                if config["merge_method"] in RANDOM or skipped:
                    continue
                to, out = out_dtype(config, dtype), folder / "out"
                said = mergekit.merge(config, folder, out, dtype="float32", to=to)
                if said != "ok":
                    raise SystemExit(f"error: {file.name}: {said}")
                found[f"out/{dtype}/{file.stem}"] = stored(out)
                if to == "float32":
                    exact = folder / "exact"
                    mergekit.merge(config, folder, exact, dtype="float64", to="float64")
                    apart, _ = units(out, exact)
                    found[f"rounding/{dtype}/{file.stem}"] = np.float32(apart)
    np.savez_compressed(arguments.out, **found)


if __name__ == "__main__":
    main()

"""mergekit's files, as they are published, against what mergekit 0.1.5 makes of them."""

import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from dare_agg.checkpoint import open_checkpoint
from dare_agg.offline.merging import merge_offline
from dare_agg.offline.recipe import make_recipe
from dare_agg.offline.recipe_file import read_recipe
from simulations.bench.mergekit_files.__main__ import FILES, RANDOM
from simulations.bench.mergekit_files.compare import tensor_units
from simulations.bench.mergekit_files.models import write_models
from simulations.bench.mergekit_files.vectors import SMALL

VECTORS = Path(__file__).resolve().parent.parent / "data" / "mergekit_files" / "vectors.npz"
# Units in the last place of float32 that our own rounding takes, beside mergekit's.
ROUNDING = 4
_BITS = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}


@cache
def vectors() -> dict[str, np.ndarray]:
    with np.load(VECTORS) as file:
        return {key: file[key] for key in file}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    drawn = {}
    for name, shapes in SMALL.all_shapes().items():
        flat, at = vectors()[f"in/{name}"], 0
        drawn[name] = {}
        for key in sorted(shapes):
            size = int(np.prod(shapes[key]))
            drawn[name][key] = flat[at : at + size].reshape(shapes[key])
            at += size
    found = {}
    for dtype in ("float32", "bfloat16"):
        found[dtype] = tmp_path_factory.mktemp(dtype)
        write_models(found[dtype], dtype, drawn, SMALL)
    return found


def cases() -> list[str]:
    return sorted(key.removeprefix("out/") for key in vectors() if key.startswith("out/"))


def test_every_file_has_a_vector() -> None:
    exact = [
        f.stem for f in FILES.glob("*.yaml")
        if not any(f"merge_method: {method}\n" in f.read_text() for method in RANDOM)
    ]  # fmt: skip
    assert {case.removeprefix("float32/") for case in cases() if "float32" in case} == {*exact}


@pytest.mark.parametrize("case", cases())
def test_out_is_mergekits(case: str, folders: dict[str, Path], tmp_path: Path) -> None:
    dtype, name = case.split("/")
    file = Path(shutil.copy(FILES / f"{name}.yaml", folders[dtype]))
    merge_offline(make_recipe(read_recipe(file).values), tmp_path / "out")
    allowed = 1.0
    if f"rounding/{case}" in vectors():
        allowed = ROUNDING + float(vectors()[f"rounding/{case}"])
    out, flat, at = open_checkpoint(tmp_path / "out"), vectors()[f"out/{case}"], 0
    for key in sorted(out.names):
        info = out.tensors[key]
        right = flat[at : at + int(np.prod(info.shape))]
        at += right.size
        assert right.dtype == _BITS[info.dtype]
        values = right.astype(np.float64)
        if info.dtype == "BF16":
            values = (right.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        ours = out.array(key).astype(np.float64).ravel()
        apart = tensor_units(ours, values, info.dtype).max(initial=0)
        assert apart <= allowed, key
    assert at == flat.size

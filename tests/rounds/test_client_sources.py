"""An update made of tensors where they lie is the update made of arrays, in bounded memory."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dare_agg.checkpoint import open_checkpoint, write_checkpoint
from dare_agg.checkpoint.model import model_in
from dare_agg.codec.mask import parse_drop_rate
from dare_agg.errors import ApartError, BaseMismatchError, LayoutError, NonFiniteError
from dare_agg.rounds.client import client_update, make_client_update, update_of_arrays
from dare_agg.rounds.plan import RoundPlan, make_plans
from dare_agg.rounds.terms import UpdateTerms
from dare_agg.vectors.model import GlobalModel
from dare_agg.vectors.rounded import rounded_model
from dare_agg.vectors.sources import array_source

RNG = np.random.default_rng(5)


@pytest.fixture
def start(tmp_path: Path) -> GlobalModel:
    embedding = RNG.standard_normal((300, 40)).astype(np.float32)
    arrays = {
        "embed": embedding,
        "out": embedding.copy(),
        "body": RNG.standard_normal((400, 200)).astype(np.float32),
        "norm.running_mean": RNG.standard_normal(9).astype(np.float32),
        "head": RNG.standard_normal(5).astype(np.float32),
    }
    write_checkpoint(tmp_path / "m.safetensors", arrays, dtypes={"body": "BF16"})
    return model_in(open_checkpoint(tmp_path / "m.safetensors"), exclude=["head"])


def plan_of(model: GlobalModel, **terms: object) -> RoundPlan:
    agreed = UpdateTerms(parse_drop_rate("0.9"), exclude=("head",), **terms)  # type: ignore[arg-type]
    return make_plans(b"s" * 32, 1, [None], agreed, model.ref)[0]


def tuned_of(model: GlobalModel) -> dict[str, np.ndarray]:
    change = RNG.standard_normal((400, 200)).astype(np.float32) * np.float32(1e-3)
    arrays = dict(model.arrays())
    return {
        **arrays,
        "body": arrays["body"] + change,
        "norm.running_mean": arrays["norm.running_mean"] + 1,
    }


def test_files_and_arrays_give_the_same_bytes(start: GlobalModel, tmp_path: Path) -> None:
    plan, tuned = plan_of(start), tuned_of(start)
    expected = make_client_update(plan, dict(start.arrays()), tuned, by_form=True)
    assert update_of_arrays(plan, start, tuned) == expected
    part = {name: tuned[name] for name in ("body", "norm.running_mean")}
    assert update_of_arrays(plan, start, part) == expected
    write_checkpoint(tmp_path / "t.safetensors", {**tuned, "extra": np.ones(3, np.float32)})
    read = open_checkpoint(tmp_path / "t.safetensors").reader(start.groups.layout)
    dense = start.groups.flatten_dense(tuned)
    assert client_update(plan, start, read, dense) == expected


def test_fisher_values_are_read_where_they_lie(start: GlobalModel) -> None:
    plan, tuned = plan_of(start, statistics="fisher"), tuned_of(start)
    fisher = {"body": np.abs(RNG.standard_normal((400, 200))).astype(np.float32)}
    expected = make_client_update(plan, dict(start.arrays()), tuned, fisher, by_form=True)
    assert update_of_arrays(plan, start, tuned, fisher) == expected
    with pytest.raises(NonFiniteError, match="among the Fisher values"):
        update_of_arrays(plan, start, tuned, {"body": fisher["body"] * np.nan})


@pytest.mark.parametrize("word", ["bfloat16", "float16"])
def test_what_loading_rounded_away_is_no_change(start: GlobalModel, word: str) -> None:
    plan = plan_of(start)
    moved = start.placed(start.delta[:] * np.float32(1.001), start.dense, start.ref)
    loaded = rounded_model(moved, dict.fromkeys(start.groups.names, word))
    update = client_update(plan, loaded, array_source(loaded.delta[:]), loaded.dense)
    assert update.delta_norm == update.delta_max == 0
    untouched = client_update(plan, moved, array_source(loaded.delta[:]), loaded.dense)
    assert untouched.delta_norm > 0


def test_bad_input_is_refused_by_name(start: GlobalModel) -> None:
    plan, tuned = plan_of(start), tuned_of(start)
    other = start.placed(start.delta, start.dense, replace(start.ref, base="ab" * 32))
    with pytest.raises(BaseMismatchError, match="fetch the global model again"):
        update_of_arrays(plan, other, tuned)
    with pytest.raises(LayoutError, match="'body' has shape"):
        update_of_arrays(plan, start, {"body": np.zeros((2, 2), np.float32)})
    with pytest.raises(ApartError, match="are one in the global model"):
        update_of_arrays(plan, start, {**tuned, "out": tuned["out"] + 1})
    tuned["body"][7, 3] = np.inf
    with pytest.raises(NonFiniteError, match=r"'body' at index \(7, 3\)"):
        update_of_arrays(plan, start, tuned)


_PROBE = """
import sys
from dare_agg.checkpoint import open_checkpoint
from dare_agg.checkpoint.model import model_in
from dare_agg.codec.mask import parse_drop_rate
from dare_agg.rounds.client import client_update
from dare_agg.rounds.plan import make_plans
from dare_agg.rounds.terms import UpdateTerms
from simulations.runs.memory import Peak, memory_of

before = memory_of()[0]
with Peak(period=0.005) as peak:
    start = model_in(open_checkpoint(sys.argv[1]))
    (plan,) = make_plans(b"s" * 32, 1, [None], UpdateTerms(parse_drop_rate("0.99")), start.ref)
    tuned = open_checkpoint(sys.argv[2]).reader(start.groups.layout)
    update = client_update(plan, start, tuned, start.dense)
    assert update.delta_max == 1.0
print((peak.own - before) >> 20)
"""


def _sparse(path: Path, dtype: str, width: int, rows: int, first: bytes) -> None:
    shape = {"dtype": dtype, "shape": [rows, 1024], "data_offsets": [0, rows * 1024 * width]}
    text = json.dumps({"w": shape}).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + first)
        file.truncate(8 + len(text) + rows * 1024 * width)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    # 64 M parameters: the arrays alone would be 256 MB each.
    _sparse(tmp_path / "base.safetensors", "BF16", 2, 1 << 16, b"\0\0")
    _sparse(tmp_path / "tuned.safetensors", "F32", 4, 1 << 16, b"\0\0\x80\x3f")
    paths = [str(tmp_path / f"{name}.safetensors") for name in ("base", "tuned")]
    ran = subprocess.run(
        [sys.executable, "-c", _PROBE, *paths], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) < 100

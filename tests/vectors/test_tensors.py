"""Tensors where they lie are read as the flat vector made of them would be, and rounded as torch
rounds."""

import numpy as np
import pytest

from dare_agg.errors import LayoutError, NonFiniteError
from dare_agg.vectors.layout import layout_of
from dare_agg.vectors.model import global_model
from dare_agg.vectors.rounded import RoundedSource, rounded_model
from dare_agg.vectors.sources import ArraySource, take
from dare_agg.vectors.tensors import TensorSource

RNG = np.random.default_rng(4)


def tensors() -> dict[str, np.ndarray]:
    return {
        "half": RNG.standard_normal((3, 7)).astype(np.float16),
        "double": RNG.standard_normal(11),
        "turned": RNG.standard_normal((5, 6)).astype(np.float32).T,
        "strided": RNG.standard_normal((4, 10)).astype(np.float32)[:, ::2],
        "number": np.array(0.25, np.float32),
    }


def test_any_part_and_any_positions_are_those_of_the_flat_vector() -> None:
    arrays = tensors()
    layout = layout_of({name: array.shape for name, array in arrays.items()})
    whole, source = layout.flatten(arrays), TensorSource(layout, arrays)
    for lo in range(0, layout.size, 3):
        for hi in range(lo, layout.size + 1, 7):
            out = np.empty(hi - lo, np.float32)
            source.read(lo, hi, out)
            np.testing.assert_array_equal(out, whole[lo:hi])
    for step in (1, 5, 60):
        positions = np.arange(2, layout.size, step)
        np.testing.assert_array_equal(source.take(positions), whole[positions])
    assert source.take(np.empty(0, np.int64)).size == 0


def test_what_is_not_there_is_read_from_elsewhere() -> None:
    arrays = tensors()
    layout = layout_of({name: array.shape for name, array in arrays.items()})
    before = RNG.standard_normal(layout.size).astype(np.float32)
    part = {name: arrays[name] for name in ("half", "turned")}
    source = TensorSource(layout, part, ArraySource(before))
    expected = layout.flatten({**layout.unflatten(before), **part})
    out = np.empty(layout.size, np.float32)
    source.read(0, layout.size, out)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(source.take(np.arange(layout.size)), expected)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"half": np.zeros((3, 8), np.float16)}, "'half' has shape"),
        ({"half": np.zeros((3, 7), np.int64)}, "'half' has dtype int64"),
        ({"half": None}, "'half' is missing"),
    ],
)
def test_other_tensors_are_refused(changes, says) -> None:
    arrays = tensors()
    layout = layout_of({name: array.shape for name, array in arrays.items()})
    wrong = {n: a for n, a in {**arrays, **changes}.items() if a is not None}
    with pytest.raises(LayoutError, match=says):
        TensorSource(layout, wrong)


def test_a_version_is_rounded_as_torch_rounds_it() -> None:
    torch = pytest.importorskip("torch")
    arrays = {
        "a": RNG.standard_normal((40, 25)).astype(np.float32),
        "b": RNG.standard_normal((40, 25)).astype(np.float32),
        "c": RNG.standard_normal((4, 25)).astype(np.float32),
        "norm": RNG.standard_normal(9).astype(np.float32),
    }
    model = global_model(arrays, dense=["norm"])
    words = {"a": "bfloat16", "b": "float16", "c": "float32", "norm": "bfloat16", "none": "float16"}
    found = rounded_model(model, words)
    assert found.ref == model.ref
    for name, array in found.arrays().items():
        kind = getattr(torch, words[name])
        expected = torch.from_numpy(arrays[name]).to(kind).to(torch.float32).numpy()
        np.testing.assert_array_equal(array, expected)
    positions = np.arange(3, model.delta.size, 17)
    np.testing.assert_array_equal(take(found.delta, positions), found.delta[:][positions])
    exact = rounded_model(model, {"a": "float64", "other": "bfloat16"})
    assert exact.delta is model.delta


def test_a_dtype_that_cannot_hold_the_version_is_refused() -> None:
    model = global_model({"a": np.array([[1e5, 1.0], [2.0, 3.0]], np.float32)})
    with pytest.raises(LayoutError, match="'a' has dtype int8"):
        rounded_model(model, {"a": "int8"})
    with pytest.raises(NonFiniteError, match=r"100000 in tensor 'a' .* does not fit float16"):
        rounded_model(model, {"a": "float16"}).delta[:]
    source = RoundedSource(model.groups.layout, ArraySource(model.delta[:]), {"a": "float16"})
    np.testing.assert_array_equal(source.take(np.array([1, 3])), [1, 3])

"""Methods on whole models: nuslerp, multislerp, linear; against the formula in float64."""

import numpy as np
import pytest

from dare_agg.errors import MergeError
from dare_agg.merge.engine import merge_deltas, prepare_merge
from dare_agg.merge.task import Scratch
from dare_agg.vectors.layout import layout_of
from dare_agg.vectors.sources import array_source

SHAPES = {"w": (4, 6), "b": (5,), "c": (3, 2, 4)}
LAYOUT = layout_of(SHAPES)
RNG = np.random.default_rng(3)
BASE, *MODELS = (RNG.standard_normal(LAYOUT.size).astype(np.float32) for _ in range(4))


def interpolated(a: np.ndarray, b: np.ndarray, t: float, axis: int | None) -> np.ndarray:
    def size(x: np.ndarray) -> np.ndarray:
        return np.sqrt((x**2).sum(axis=axis, keepdims=True))

    angle = np.arccos((a * b).sum(axis=axis, keepdims=True) / size(a) / size(b))
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


@pytest.mark.parametrize("of", ["deltas", "models"])
@pytest.mark.parametrize(("along", "axis"), [("tensors", None), ("rows", -1), ("columns", 0)])
@pytest.mark.parametrize("weights", [[0.3, 0.9], [0.7, -0.2], [0.5, -0.5]])
def test_nuslerp(of: str, along: str, axis: int | None, weights: list[float]) -> None:
    total = sum(weights)
    t = weights[1] / total if total else 0.5
    pair = [m if of == "models" else m - BASE for m in MODELS[:2]]
    whole = [LAYOUT.unflatten(vector) for vector in pair]
    expected = LAYOUT.flatten(
        {
            name: interpolated(*(x[name].astype(np.float64) for x in whole), t, axis).astype(
                np.float32
            )
            for name in SHAPES
        }
    )
    for tile in (7, 1 << 16):
        merged, _ = merge_deltas(
            LAYOUT, [array_source(m - BASE) for m in MODELS[:2]], "nuslerp", weights=weights,
            options={"of": of, "along": along}, base=array_source(BASE), tile=tile,
        )  # fmt: skip
        found = merged + BASE if of == "models" else merged
        np.testing.assert_allclose(found, expected, rtol=0, atol=3e-6)


def test_nuslerp_of_parallel_and_empty_deltas() -> None:
    layout = layout_of({"w": (2,), "v": (2,)})
    first, second = np.array([1, 2, 0, 0], np.float32), np.array([2, 4, 0, 3], np.float32)
    merged, _ = merge_deltas(
        layout, [array_source(first), array_source(second)], "nuslerp", weights=[1, 3]
    )
    # Parallel ones are interpolated linearly, an empty one stands at right angles to all.
    np.testing.assert_allclose(merged, [1.75, 3.5, 0, 3 * np.sin(0.375 * np.pi)], rtol=1e-6)


def test_nuslerp_takes_two_models() -> None:
    with pytest.raises(MergeError, match="two models, not 3"):
        merge_deltas(LAYOUT, [array_source(m) for m in MODELS], "nuslerp")


def test_multislerp_of_models_is_that_of_deltas_to_zero() -> None:
    deltas = [array_source(m - BASE) for m in MODELS]
    weights = [0.5, 0.2, 0.9]
    merged, _ = merge_deltas(
        LAYOUT, deltas, "multislerp", weights=weights, options={"of": "models"},
        base=array_source(BASE),
    )  # fmt: skip
    expected, _ = merge_deltas(
        LAYOUT, [array_source(m) for m in MODELS], "multislerp", weights=weights
    )
    np.testing.assert_allclose(merged + BASE, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("method", ["linear", "slerp", "nuslerp", "multislerp", "karcher"])
def test_kernels_that_write_models_add_the_base(method: str) -> None:
    deltas = [array_source(m - BASE) for m in MODELS[:2]]
    along = {"along": "columns"} if method == "nuslerp" else {}
    ready = {"weights": [0.2, 0.5], "options": along, "base": array_source(BASE)}
    merged, _ = merge_deltas(LAYOUT, deltas, method, **ready)
    kernel, task = prepare_merge(LAYOUT, deltas, method, **ready, writes_model=True)
    assert task.writes_model
    out = np.empty(LAYOUT.size, np.float32)
    kernel(0, LAYOUT.size, out, Scratch())
    np.testing.assert_allclose(out, merged + BASE, rtol=0, atol=2e-6)


@pytest.mark.parametrize("method", ["linear", "multislerp"])
def test_weights_without_a_sum_are_no_mean(method: str) -> None:
    deltas = [array_source(m - BASE) for m in MODELS[:2]]
    with pytest.raises(MergeError, match="sum of the weights, which is 0 here"):
        merge_deltas(LAYOUT, deltas, method, weights=[0.5, -0.5], base=array_source(BASE))


def test_what_shrinks_keeps_its_digits() -> None:
    kernel, _ = prepare_merge(
        LAYOUT, [array_source(m - BASE) for m in MODELS[:2]], "linear", weights=[1e-5, 2e-5],
        options={"normalize": False}, base=array_source(BASE), writes_model=True,
    )  # fmt: skip
    out = np.empty(LAYOUT.size, np.float32)
    kernel(0, LAYOUT.size, out, Scratch())
    first, second = (m.astype(np.float64) for m in MODELS[:2])
    np.testing.assert_allclose(out, 1e-5 * first + 2e-5 * second, rtol=0, atol=3e-11)

"""WUDI in closed form: the definition by another road, its inputs, and its bits."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from dare_agg.errors import ConfigError, MergeError
from dare_agg.merge import by_tensor
from dare_agg.merge.engine import merge_deltas
from dare_agg.merge.linears import transposed_in
from dare_agg.vectors.layout import Layout, layout_of
from dare_agg.vectors.sources import array_source

RNG = np.random.default_rng(5)
SHAPES = {
    "embed_tokens.weight": (30, 12),
    "a.up.weight": (20, 12),
    "a.up.bias": (20,),
    "b.down.weight": (6, 40),
    "norm.weight": (12,),
}


def deltas_of(
    shapes: dict[str, tuple[int, ...]], count: int = 3, scale: float = 1e-3
) -> list[dict[str, np.ndarray]]:
    # Rows of few directions, as training leaves them.
    found = []
    for _ in range(count):
        delta = {}
        for name, shape in shapes.items():
            if len(shape) == 2:
                rank = 3
                delta[name] = RNG.standard_normal((shape[0], rank)) @ RNG.standard_normal(
                    (rank, shape[1])
                )
                delta[name] += 0.1 * RNG.standard_normal(shape)
            else:
                delta[name] = RNG.standard_normal(shape)
            delta[name] = (delta[name] * scale).astype(np.float32)
        found.append(delta)
    return found


def merged(
    layout: Layout, deltas: Sequence[dict[str, np.ndarray]], **settings: Any
) -> dict[str, np.ndarray]:
    sources = [array_source(layout.flatten(delta)) for delta in deltas]
    return layout.unflatten(merge_deltas(layout, sources, "wudi", **settings)[0])


def by_definition(
    values: Sequence[np.ndarray],
    grams_of: Sequence[np.ndarray],
    ridge: float,
    weights: Sequence[float],
) -> np.ndarray:
    """The issue's formula, with inverses, model by model."""
    taus = [np.asarray(v, np.float64) for v in values]
    grams = [
        w * np.asarray(a, np.float64).T @ a / np.linalg.norm(a.astype(np.float64)) ** 2
        for w, a in zip(weights, grams_of, strict=True)
    ]
    mean = sum(w * t for w, t in zip(weights, taus, strict=True))
    total = sum(grams)
    rho = ridge * np.trace(total) / len(total)
    right = sum(t @ g for t, g in zip(taus, grams, strict=True)) + rho * mean
    return right @ np.linalg.inv(total + rho * np.eye(len(total)))


@pytest.mark.parametrize("ridge", [0.1, 1e-3])
@pytest.mark.parametrize("weights", [None, [0.2, 0.3, 0.5], [2.0, 1.0, 1.0]])
def test_each_linear_is_the_closed_form_and_the_rest_the_mean(ridge, weights) -> None:
    layout, deltas = layout_of(SHAPES), deltas_of(SHAPES)
    found = merged(layout, deltas, options={"ridge": ridge}, weights=weights, scaling=0.5)
    shares = np.array(weights or [1, 1, 1]) / sum(weights or [1, 1, 1])
    for name in SHAPES:
        own = [delta[name] for delta in deltas]
        if name in ("a.up.weight", "b.down.weight"):
            expected = by_definition(own, own, ridge, shares)
        else:
            expected = sum(s * d for s, d in zip(shares, own, strict=True))
        np.testing.assert_allclose(found[name], 0.5 * expected, rtol=2e-5, atol=1e-9)


def test_it_minimises_the_interference_that_the_paper_poses() -> None:
    shapes = {"w.weight": (12, 16)}
    layout, deltas = layout_of(shapes), deltas_of(shapes)
    taus = [d["w.weight"].astype(np.float64) for d in deltas]

    def interference(w: np.ndarray) -> float:
        return sum(
            np.linalg.norm((w - t) @ t.T) ** 2 / np.linalg.norm(t) ** 2 for t in taus
        )  # fmt: skip

    found = merged(layout, deltas, options={"ridge": 1e-9})["w.weight"].astype(np.float64)
    least = interference(found)
    assert least < interference(sum(taus) / 3) / 2
    for _ in range(50):
        assert interference(found + 1e-5 * RNG.standard_normal(found.shape)) > least


def test_values_and_gram_matrices_may_come_from_two_sources() -> None:
    layout = layout_of(SHAPES)
    whole = deltas_of(SHAPES)
    dropped = [
        {n: a * (RNG.random(a.shape) < 0.5) * np.float32(2) for n, a in d.items()} for d in whole
    ]
    sources = [array_source(layout.flatten(delta)) for delta in whole]
    found = merged(layout, dropped, statistics=sources)
    few = [
        {n: np.linalg.svd(d[n])[1][:2, None] * np.linalg.svd(d[n])[2][:2] for n in SHAPES if
         n.endswith(("up.weight", "down.weight"))}
        for d in whole
    ]  # fmt: skip
    directed = merged(layout, dropped, statistics=few)
    # One model of each kind.
    mixed = merged(layout, dropped, statistics=[sources[0], few[1], {}])
    for name in few[0]:
        values = [d[name] for d in dropped]
        thirds = [1 / 3] * 3
        expected = by_definition(values, [d[name] for d in whole], 0.1, thirds)
        np.testing.assert_allclose(found[name], expected, rtol=2e-5, atol=1e-9)
        expected = by_definition(values, [d[name] for d in few], 0.1, thirds)
        np.testing.assert_allclose(directed[name], expected, rtol=2e-5, atol=1e-9)
        tau = [v.astype(np.float64) for v in values]
        grams = [a.astype(np.float64) for a in (whole[0][name], few[1][name])]
        grams = [a.T @ a / np.linalg.norm(a) ** 2 / 3 for a in grams]
        rho = 0.1 * np.trace(sum(grams)) / len(grams[0])
        right = tau[0] @ grams[0] + tau[1] @ grams[1] + rho * sum(tau) / 3
        expected = right @ np.linalg.inv(sum(grams) + rho * np.eye(len(grams[0])))
        np.testing.assert_allclose(mixed[name], expected, rtol=2e-5, atol=1e-9)


def test_a_tensor_without_change_is_left() -> None:
    layout, deltas = layout_of(SHAPES), deltas_of(SHAPES)
    for delta in deltas:
        delta["a.up.weight"] *= 0
    deltas[1]["b.down.weight"] *= 0
    found = merged(layout, deltas)
    assert not found["a.up.weight"].any()
    # One model without change has no Gram matrix, and its part of the mean.
    others = [deltas[0]["b.down.weight"], deltas[2]["b.down.weight"]]
    tau = [o.astype(np.float64) for o in others]
    grams = [t.T @ t / np.linalg.norm(t) ** 2 / 3 for t in tau]
    rho = 0.1 * np.trace(sum(grams)) / 40
    right = sum(t @ g for t, g in zip(tau, grams, strict=True)) + rho * sum(tau) / 3
    expected = right @ np.linalg.inv(sum(grams) + rho * np.eye(40))
    np.testing.assert_allclose(found["b.down.weight"], expected, rtol=2e-5, atol=1e-9)


def test_a_conv1d_is_the_linear_it_is_the_transpose_of() -> None:
    linear = {
        "h.c_fc.weight": (16, 8), "h.c_fc.bias": (16,), "h.mlp.c_proj.weight": (8, 16),
        "h.mlp.c_proj.bias": (8,), "h.attn.c_proj.weight": (8, 8), "h.attn.c_proj.bias": (8,),
    }  # fmt: skip
    lying = {n: s[::-1] for n, s in linear.items()}
    assert transposed_in(layout_of(lying)) == {n: True for n in linear if n.endswith("weight")}
    assert not any(transposed_in(layout_of(linear)).values())
    deltas = deltas_of(linear)
    turned = [{n: np.ascontiguousarray(a.T) for n, a in d.items()} for d in deltas]
    found = merged(layout_of(linear), deltas)
    other = merged(layout_of(lying), turned)
    for name, array in found.items():
        np.testing.assert_array_equal(other[name].T, array)
    # By name where the biases do not say it.
    bare = {n: s for n, s in lying.items() if n.endswith("weight")}
    by_name = merged(
        layout_of(bare),
        [{n: d[n] for n in bare} for d in turned],
        options={"transposed": r"c_(fc|proj)\.weight$"},
    )
    for name, array in by_name.items():
        np.testing.assert_array_equal(array.T, found[name])


def test_what_counts_as_a_linear_is_a_choice() -> None:
    layout, deltas = layout_of(SHAPES), deltas_of(SHAPES)
    mean = merged(layout, deltas, options={"averaged": "up|embed"})
    expected = sum(d["a.up.weight"] for d in deltas) / 3
    np.testing.assert_allclose(mean["a.up.weight"], expected, rtol=1e-5, atol=1e-9)
    every = merged(layout, deltas, options={"averaged": ""})
    own = [d["embed_tokens.weight"] for d in deltas]
    expected = by_definition(own, own, 0.1, [1 / 3] * 3)
    np.testing.assert_allclose(every["embed_tokens.weight"], expected, rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"options": {"linears": "("}}, ConfigError, "regular expression"),
        ({"options": {"linears": 3}}, ConfigError, "regular expression"),
        ({"options": {"linears": "nowhere"}}, MergeError, "finds no Linear"),
        ({"options": {"ridge": 0}}, ConfigError, "ridge = 0"),
        ({"options": {"rigde": 0.1}}, ConfigError, "did you mean 'ridge'"),
        ({"weights": [1.0, -0.5, 1.0]}, MergeError, "at least 0"),
        ({"weights": [0.0, 0.0, 0.0]}, MergeError, "at least 0"),
        ({"statistics": [{}]}, MergeError, "1 sources of Gram matrices for 3"),
        ({"statistics": [array_source(np.ones(3, np.float32))] * 3}, MergeError, "same model"),
        ({"statistics": [{"a.up.weight": np.ones((2, 11))}] * 3}, MergeError, "(rank, 12)"),
        ({"statistics": [{"a.up.weight": np.ones(12)}] * 3}, MergeError, "(rank, 12)"),
        ({"statistics": [{"a.up.weight": np.full((2, 12), np.nan)}] * 3}, MergeError, "finite"),
    ],
)
def test_what_does_not_fit_is_refused(settings, error, words) -> None:
    layout = layout_of(SHAPES)
    with pytest.raises(error) as caught:
        merged(layout, deltas_of(SHAPES), **settings)
    assert words in str(caught.value)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_value_that_is_none_is_named(bad, threads) -> None:
    layout, deltas = layout_of(SHAPES), deltas_of(SHAPES)
    deltas[1]["b.down.weight"][2, 3] = bad
    with pytest.raises(MergeError, match=r"model 1: 'b\.down\.weight'") as caught:
        merged(layout, deltas, threads=threads, tile=50)
    assert caught.value.reason == "non-finite"


# A size at which OpenBLAS cuts solutions among its threads, with other last bits. In float64:
# rounding to float32 would hide most of them.
_BITS = """
import hashlib, sys
import numpy as np
import dare_agg.merge.by_tensor as by_tensor
from dare_agg.merge.engine import merge_deltas
from dare_agg.vectors.layout import layout_of
from dare_agg.vectors.sources import array_source
plain, found = by_tensor.scaling_of, {}
class Noted(float):
    def __rmul__(self, solved):
        found[self.name] = hashlib.sha256(np.ascontiguousarray(solved).tobytes()).hexdigest()
        return solved
    __array_ufunc__ = None
def noted(task, entry):
    scaling = Noted(plain(task, entry))
    scaling.name = entry.name
    return scaling
by_tensor.scaling_of = noted
threads, tile = int(sys.argv[1]), int(sys.argv[2])
layout = layout_of({"a.weight": (500, 389), "b.weight": (150, 700), "c.weight": (389, 389)})
rng = np.random.default_rng(0)
deltas = [array_source(rng.standard_normal(layout.size).astype(np.float32)) for _ in range(3)]
merge_deltas(layout, deltas, "wudi", threads=threads, tile=tile)
assert len(found) == 3
print(sorted(found.items()))
"""


def bits_of(blas: int, threads: int, tile: int) -> str:
    environment = {
        **os.environ, "OPENBLAS_NUM_THREADS": str(blas), "OMP_NUM_THREADS": str(blas)
    }  # fmt: skip
    words = [sys.executable, "-c", _BITS, str(threads), str(tile)]
    done = subprocess.run(words, check=True, capture_output=True, text=True, env=environment)
    return done.stdout


def test_neither_threads_of_blas_nor_ours_change_a_bit() -> None:
    first = bits_of(1, 1, 1 << 16)
    assert first == bits_of(2, 1, 1 << 16)
    assert first == bits_of(2, 3, 10_007)


def test_each_tensor_is_solved_once_whatever_the_threads(monkeypatch) -> None:
    shapes = {f"l{i}.weight": (40, 50) for i in range(6)}
    layout, deltas = layout_of(shapes), deltas_of(shapes, 2)
    solved: list[str] = []
    plain = by_tensor.scaling_of

    def counted(task, entry):
        solved.append(entry.name)
        return plain(task, entry)

    monkeypatch.setattr(by_tensor, "scaling_of", counted)
    digests = set()
    for threads in (1, 2, 5):
        solved.clear()
        found = merged(layout, deltas, threads=threads, tile=333)
        digests.add(hashlib.sha256(b"".join(a.tobytes() for a in found.values())).hexdigest())
        assert sorted(solved) == sorted(shapes)
    assert len(digests) == 1

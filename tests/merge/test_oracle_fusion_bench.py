"""Iso-C, TSV-M, KnOTS and WUDI against FusionBench 0.2.33, and what they must do by themselves.

``tests/data/fusion_bench/make_vectors.py`` says how the vectors were made.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dare_agg.errors import ConfigError, MergeError
from dare_agg.merge.engine import merge_deltas
from dare_agg.vectors.layout import layout_of
from dare_agg.vectors.sources import array_source

DATA = Path(__file__).resolve().parent.parent / "data" / "fusion_bench" / "vectors.npz"
SHAPES = {"up.weight": (20, 12), "down.weight": (9, 24), "square.weight": (16, 16), "b.bias": (7,)}
LINEARS = sorted(set(SHAPES) - {"b.bias"})
LAYOUT = layout_of(SHAPES)
RNG = np.random.default_rng(8)


@cache
def load() -> dict[str, np.ndarray]:
    with np.load(DATA) as file:
        return {key: file[key] for key in file}


def deltas() -> list[dict[str, np.ndarray]]:
    return [{name: load()[f"deltas/{i}/{name}"] for name in SHAPES} for i in range(3)]


def merged(method: str, given: list[dict[str, np.ndarray]], **settings: Any):
    sources = [array_source(LAYOUT.flatten(delta)) for delta in given]
    return LAYOUT.unflatten(merge_deltas(LAYOUT, sources, method, **settings)[0])


@pytest.mark.parametrize("method", ["iso-c", "tsv-m"])
@pytest.mark.parametrize(("threads", "tile"), [(1, 1 << 16), (3, 37)])
def test_the_reference_gives_the_same(method, threads, tile) -> None:
    found = merged(method, deltas(), threads=threads, tile=tile)
    for name in SHAPES:
        # Theirs in float64, ours rounded to float32 in the end.
        np.testing.assert_allclose(found[name], load()[f"{method}/{name}"], rtol=1e-6, atol=3e-9)


@pytest.mark.parametrize("method", ["iso-c", "tsv-m"])
def test_scaling_multiplies_and_weights_weigh(method) -> None:
    given = deltas()
    plain = merged(method, given)
    half = merged(method, given, scaling=0.5)
    double = [{n: 2 * a for n, a in d.items()} for d in given]
    weighted = merged(method, given, weights=[2.0, 2.0, 2.0])
    doubled = merged(method, double)
    for name in SHAPES:
        np.testing.assert_allclose(half[name], 0.5 * plain[name], rtol=1e-6, atol=1e-10)
        if name in LINEARS:
            np.testing.assert_allclose(weighted[name], doubled[name], rtol=1e-5, atol=1e-9)
        else:
            np.testing.assert_allclose(weighted[name], plain[name], rtol=1e-6, atol=1e-10)


def test_adam_does_not_undercut_the_closed_form() -> None:
    given = deltas()
    found = merged("wudi", given, options={"ridge": 1e-9})
    for name in LINEARS:
        taus = [d[name].astype(np.float64) for d in given]

        def interference(w: np.ndarray, taus: list[np.ndarray] = taus) -> float:
            return sum(
                np.linalg.norm((w - t) @ t.T) ** 2 / np.linalg.norm(t) ** 2 for t in taus
            )  # fmt: skip

        ours, theirs = interference(found[name]), interference(load()[f"wudi/{name}"])
        assert ours < theirs
        # It is on its way there.
        assert theirs < interference(sum(taus))


@pytest.mark.parametrize("trim", [0.0, 0.8])
def test_knots_is_ties_in_the_basis_that_the_reference_finds(trim) -> None:
    given = deltas()
    found = merged("knots", given, options={"trim": trim})
    for name in LINEARS:
        basis = load()[f"knots/{name}/basis"]
        parts = np.stack([load()[f"knots/{name}/{i}"] for i in range(3)])
        cut = int(parts[0].size * trim)
        if cut:
            for part in parts:
                part[np.abs(part) <= np.sort(np.abs(part), axis=None)[cut - 1]] = 0
        elected = np.sign(parts.sum(axis=0))
        agreeing = (parts * elected) > 0
        mean = np.where(agreeing, parts, 0).sum(axis=0) / np.maximum(1, agreeing.sum(axis=0))
        np.testing.assert_allclose(found[name], basis @ mean, rtol=1e-5, atol=2e-9)


@pytest.mark.parametrize("method", ["iso-c", "tsv-m", "knots"])
def test_adapters_of_low_rank_leave_nothing_where_none_was(method) -> None:
    # Two adapters of rank 2: no merge has a direction outside their spans.
    factors = [
        (RNG.standard_normal((20, 2)) * 1e-2, RNG.standard_normal((2, 12))) for _ in range(2)
    ]
    given = []
    for left, right in factors:
        delta = {n: np.zeros(s, np.float32) for n, s in SHAPES.items()}
        delta["up.weight"] = (left @ right).astype(np.float32)
        given.append(delta)
    options = {"trim": 0.0} if method == "knots" else {}
    found = merged(method, given, options=options)
    assert not found["down.weight"].any() and not found["square.weight"].any()
    span, _ = np.linalg.qr(np.concatenate([left for left, _ in factors], axis=1))
    outside = found["up.weight"] - span @ (span.T @ found["up.weight"])
    assert np.abs(found["up.weight"]).max() > 1e-4
    assert np.abs(outside).max() < 1e-6 * np.abs(found["up.weight"]).max() + 1e-9


def test_one_model_comes_back_where_nothing_is_to_be_merged() -> None:
    given = deltas()[:1]
    for method, options in (("tsv-m", {}), ("knots", {"trim": 0.0}), ("wudi", {})):
        found = merged(method, given, options=options)
        for name in SHAPES:
            np.testing.assert_allclose(found[name], given[0][name], rtol=2e-5, atol=1e-8)
    # And two equal ones are one.
    for method, options in (("knots", {"trim": 0.0}), ("wudi", {})):
        found = merged(method, given * 2, options=options)
        for name in SHAPES:
            np.testing.assert_allclose(found[name], given[0][name], rtol=2e-5, atol=1e-8)


@pytest.mark.parametrize("method", ["iso-c", "tsv-m", "knots"])
def test_what_does_not_fit_is_refused(method) -> None:
    given = deltas()
    with pytest.raises(MergeError, match="sum to 0"):
        merged(method, given, weights=[1.0, -1.0, 0.0])
    with pytest.raises(ConfigError, match="regular expression"):
        merged(method, given, options={"linears": "["})
    with pytest.raises(MergeError, match="finds no Linear"):
        merged(method, given, options={"linears": "^nothing$"})
    given[2]["square.weight"][0, 0] = np.inf
    with pytest.raises(MergeError, match=r"model 2: 'square\.weight'"):
        merged(method, given)


@pytest.mark.parametrize(
    ("method", "options"),
    [("tsv-m", {"share": 0}), ("tsv-m", {"share": 2}), ("knots", {"trim": 1.5})],
)
def test_options_have_bounds(method, options) -> None:
    with pytest.raises(ConfigError, match="are allowed"):
        merged(method, deltas(), options=options)

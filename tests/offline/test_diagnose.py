"""Diagnosis against plain numpy on whole vectors."""

import json

import numpy as np

from dare_agg.offline.diagnose import QUANTILES, diagnose_deltas
from dare_agg.vectors.layout import layout_of
from dare_agg.vectors.sources import array_source

LAYOUT = layout_of({"a": (300, 70), "b": (11,), "none": (0,)})


def deltas(scale: float, count: int = 3, common: float = 0.0) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    shared = rng.standard_normal(LAYOUT.size) * common
    return [
        (shared + rng.standard_normal(LAYOUT.size) * scale).astype(np.float32) for _ in range(count)
    ]


def test_figures_are_those_of_the_whole_vectors() -> None:
    vectors = deltas(0.004)
    vectors[0][::5] = 0
    found = diagnose_deltas(LAYOUT, [array_source(v) for v in vectors], tile=1000)
    for vector, model in zip(vectors, found.models, strict=True):
        sizes = np.abs(vector)
        assert model.above_small == np.mean(sizes > np.float32(0.005))
        assert model.above_large == np.mean(sizes > np.float32(0.01))
        assert model.zeros == np.mean(vector == 0)
        assert model.largest == sizes.max()
        np.testing.assert_allclose(model.norm, np.linalg.norm(vector.astype(float)), rtol=1e-9)
        np.testing.assert_allclose(model.quantiles, np.quantile(sizes, QUANTILES), rtol=0.05)
    wide = np.stack(vectors).astype(float)
    norms = np.linalg.norm(wide, axis=1)
    np.testing.assert_allclose(found.cosine, wide @ wide.T / np.outer(norms, norms), atol=1e-9)
    used = (vectors[0] != 0) & (vectors[1] != 0)
    assert found.conflict[0][1] == np.mean(np.sign(vectors[0])[used] != np.sign(vectors[1])[used])
    assert found.survivors["0.9"] == 0.3
    json.dumps(found.as_dict(), allow_nan=False)


def test_tiles_change_nothing_but_rounding() -> None:
    sources = [array_source(v) for v in deltas(0.001)]
    a, b = (diagnose_deltas(LAYOUT, sources, tile=t) for t in (1 << 16, 777))
    np.testing.assert_allclose(a.cosine, b.cosine, rtol=1e-12)
    assert a.conflict == b.conflict
    assert a.models[0].quantiles == b.models[0].quantiles


def test_the_safe_drop_rate_falls_with_the_range() -> None:
    rates = [
        diagnose_deltas(LAYOUT, [array_source(v) for v in deltas(s)]).safe_drop_rate
        for s in (0.0005, 0.0025, 0.02)
    ]
    assert rates == [0.9, 0.5, 0.0]
    unsafe = diagnose_deltas(LAYOUT, [array_source(v) for v in deltas(0.02)], names=["x", "y", "z"])
    assert any("x: " in w and "unsafe" in w for w in unsafe.warnings)


def test_another_base_is_noticed() -> None:
    strangers = diagnose_deltas(LAYOUT, [array_source(v) for v in deltas(0.001)])
    siblings = diagnose_deltas(LAYOUT, [array_source(v) for v in deltas(0.001, common=0.02)])
    assert not any("nearer" in w for w in strangers.warnings)
    assert any("nearer to each other than to BASE" in w for w in siblings.warnings)


def test_an_unchanged_model_is_named() -> None:
    found = diagnose_deltas(LAYOUT, [array_source(np.zeros(LAYOUT.size, np.float32))])
    assert "equals the base" in found.warnings[0]

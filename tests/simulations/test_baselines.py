"""Baselines: Golomb round trip and size, unbiasedness, bytes, feedback."""

from __future__ import annotations

import numpy as np
import pytest

from dare_agg.errors import ConfigError
from simulations.runs.baselines import COMPRESSORS, library, make_compressor, qsgd, randk, stc, topk
from simulations.runs.golomb import decode_positions, encode_positions


@pytest.mark.parametrize("keep", [0.001, 0.01, 0.1, 0.5, 1.0])
def test_golomb_round_trip_and_near_entropy(keep: float) -> None:
    rng = np.random.default_rng(1)
    size = 200_000
    positions = np.sort(rng.choice(size, max(1, int(size * keep)), replace=False))
    blob = encode_positions(positions, size)
    assert np.array_equal(decode_positions(blob), positions)
    if 0.001 < keep < 0.5:
        entropy = -(keep * np.log2(keep) + (1 - keep) * np.log2(1 - keep)) * size / 8
        assert entropy * 0.99 < len(blob) < entropy * 1.06


def test_golomb_of_nothing() -> None:
    assert decode_positions(encode_positions(np.empty(0, np.int64), 10)).size == 0


@pytest.mark.parametrize("bits", [4, 8])
def test_qsgd_is_unbiased(bits: int) -> None:
    vector = np.random.default_rng(2).standard_normal(2000).astype(np.float32)
    rng = np.random.default_rng(3)
    mean = np.mean([qsgd(vector, rng, bits=bits)[0] for _ in range(400)], axis=0)
    step = np.abs(vector).max() / (2 ** (bits - 1) - 1)
    assert np.abs(mean - vector).max() < 5 * step / 2 / np.sqrt(400) + 1e-6
    assert qsgd(vector, rng, bits=bits)[1] == 2000 * bits // 8 + 4 * 4


def test_randk_and_library_are_unbiased() -> None:
    vector = np.random.default_rng(4).standard_normal(512).astype(np.float32)
    rng = np.random.default_rng(5)
    for draw in (
        lambda: randk(vector, rng, keep=0.5)[0],
        lambda: library(vector, rng, drop_rate="0.5", values="b1")[0],
    ):
        mean = np.mean([draw() for _ in range(600)], axis=0)
        assert np.sqrt(np.mean((mean - vector) ** 2)) < 0.09


def test_topk_keeps_the_largest_and_stc_their_mean() -> None:
    vector = np.array([0.1, -4, 0.2, 3, -0.3, 0, 0, 0, 0, 0], np.float32)
    rng = np.random.default_rng(6)
    kept, _ = topk(vector, rng, keep=0.2)
    assert np.array_equal(np.flatnonzero(kept), [1, 3])
    ternary, _ = stc(vector, rng, keep=0.2)
    assert ternary[1] == -3.5 and ternary[3] == 3.5


def test_feedback_sends_in_the_end_what_it_kept() -> None:
    settings = {"drop_rate": "0.9", "feedback": True}
    compressor = make_compressor("topk", 100, 0, settings)
    vector = np.arange(1, 101, dtype=np.float32) / 100
    total = sum(compressor.send(0, number, vector)[0] for number in range(200))
    assert np.abs(total / 200 - vector).max() < 0.12


def test_stc_compresses_both_links() -> None:
    compressor = make_compressor("stc", 1000, 0, {"drop_rate": "0.9", "feedback": False})
    step = np.random.default_rng(7).standard_normal(1000).astype(np.float32)
    assert np.count_nonzero(compressor.merge(step)) == 100
    assert compressor.down_bytes is not None and compressor.down_bytes < 4000 / 20


def test_every_baseline_is_finite_and_smaller_than_float32() -> None:
    vector = np.random.default_rng(8).standard_normal(5000).astype(np.float32)
    for name in COMPRESSORS:
        compressor = make_compressor(name, 5000, 0, {"drop_rate": "0.9", "feedback": False})
        restored, nbytes = compressor.send(0, 1, vector)
        assert np.isfinite(restored).all() and 0 < nbytes < 20_000 / 3


def test_unknown_baseline_is_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'topk'"):
        make_compressor("topkk", 10, 0, {"drop_rate": "0.9", "feedback": False})

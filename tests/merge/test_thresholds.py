"""Exact order statistics against sorting, on values that crowd and brackets that miss."""

import numpy as np
import pytest

from dare_agg.errors import MergeError
from dare_agg.merge import thresholds
from dare_agg.merge.thresholds import kth_smallest_of_each
from dare_agg.vectors.sources import array_source

SIZE = 150_000


def kinds() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    plain = rng.standard_normal(SIZE)
    crowded = np.round(plain * 40) / 40
    unlike = plain * np.where(np.arange(SIZE) < SIZE // 3, 1e-6, 1.0)
    # Runs of the sample see nothing of the large values between them.
    hidden = np.zeros(SIZE)
    hidden[200::4688] = 1 + np.arange(hidden[200::4688].size)
    return {
        "plain": plain, "crowded": crowded, "unlike": unlike, "hidden": hidden,
        "zeros": np.zeros(SIZE), "huge": plain * 3e37, "tiny": plain * 1e-44,
    }  # fmt: skip


@pytest.mark.parametrize(("held", "bins"), [(1 << 20, 1 << 20), (500, 256)])
def test_ranks_are_those_of_the_sorted_values(
    monkeypatch: pytest.MonkeyPatch, held: int, bins: int
) -> None:
    monkeypatch.setattr(thresholds, "_HELD", held)
    monkeypatch.setattr(thresholds, "_BINS", bins)
    monkeypatch.setattr(thresholds, "_TOGETHER", 3)
    vectors = [v.astype(np.float32) for v in kinds().values()]
    spans = [(0, 100_000), (100_000, 100_050), (100_050, SIZE)]
    for share in (0.0, 0.1, 0.9, 0.9999):
        ranks = [[round(share * (hi - lo)) for lo, hi in spans] for _ in vectors]
        found = kth_smallest_of_each([array_source(v) for v in vectors], spans, ranks, 9000)
        for number, vector in enumerate(vectors):
            for i, (lo, hi) in enumerate(spans):
                rank = ranks[number][i]
                expected = np.sort(np.abs(vector[lo:hi]))[rank - 1] if rank else -1
                assert found[number, i] == expected, (number, share, i)


def test_values_without_an_order_are_refused() -> None:
    vector = np.full(SIZE, np.nan, np.float32)
    with pytest.raises(MergeError, match="not finite"):
        kth_smallest_of_each([array_source(vector)], [(0, SIZE)], [[5]], 1 << 16)

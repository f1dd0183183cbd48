"""As many entries as a count asks, also where many are equal."""

import numpy as np
import pytest

from dare_agg.merge.engine import merge_deltas
from dare_agg.merge.selection import SelectedSource, select
from dare_agg.vectors.layout import layout_of
from dare_agg.vectors.sources import array_source

# A few values, as deltas of bfloat16 models have, over more than one block and three spans.
VALUES = np.random.default_rng(5).integers(-4, 5, 150_000).astype(np.float32)
SPANS = [(0, 70_000), (70_000, 70_007), (70_007, 150_000)]


def ranked(values: np.ndarray, later: bool, first: int, stop: int) -> np.ndarray:
    """Ranks [first, stop) by ascending magnitude, the first of equal entries the largest, or the
    last."""
    order = np.lexsort(((1 if later else -1) * np.arange(values.size), np.abs(values)))
    kept = np.zeros_like(values)
    kept[order[first:stop]] = values[order[first:stop]]
    return kept


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize(
    "ranks",
    [
        [(69_000, 70_000), (3, 7), (0, 79_993)],
        [(20_000, 60_001), (2, 3), (40_000, 40_001)],
        [(0, 1), (7, 7), (79_992, 79_993)],
    ],
)
def test_ranks_stay(ranks: list[tuple[int, int]], later: bool) -> None:
    source = array_source(VALUES)
    left = SelectedSource(source, select(source, SPANS, ranks, 1 << 12, later_is_larger=later))
    expected = np.concatenate(
        [ranked(VALUES[lo:hi], later, *own) for (lo, hi), own in zip(SPANS, ranks, strict=True)]
    )
    for step in (150_000, 7_001):
        found = np.empty_like(VALUES)
        for lo in range(0, VALUES.size, step):
            left.read(lo, min(VALUES.size, lo + step), found[lo : lo + step])
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("method", ["ties", "breadcrumbs"])
def test_equal_magnitudes_are_counted(method: str) -> None:
    layout = layout_of({"w": (10,)})
    delta = np.array([1, -1, 1, -1, 1, -1, 1, -1, 1, -1], np.float32)
    options = {"density": 0.3}
    options |= {"trim-scope": "tensor"} if method == "ties" else {"gamma": 0.2}
    merged, _ = merge_deltas(layout, [array_source(delta)], method, options=options)
    assert np.count_nonzero(merged) == 3


def test_sce_takes_a_share_of_equally_varied_elements() -> None:
    layout = layout_of({"w": (10,)})
    deltas = [array_source(sign * np.ones(10, np.float32)) for sign in (1, 3)]
    merged, _ = merge_deltas(layout, deltas, "sce", options={"select-topk": 0.4})
    assert np.count_nonzero(merged) == 4


def test_the_rounding_of_the_products_decides_what_cancels() -> None:
    # 0.3·1 + 0.3·5 − 0.3·6 is below zero in float32, and mergekit takes that sign.
    layout = layout_of({"w": (1,)})
    parts = [np.float32(0.3) * np.float32(x) for x in (1, 5, -6)]
    total = np.float32(np.float32(parts[0] + parts[1]) + parts[2])
    assert total < 0
    merged, _ = merge_deltas(
        layout, [array_source(np.array([x], np.float32)) for x in (1, 5, -6)], "ties",
        weights=[0.3] * 3, options={"trim": 0, "sign-tie": "positive"},
    )  # fmt: skip
    assert merged.tolist() == [-6]

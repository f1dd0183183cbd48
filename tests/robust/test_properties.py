"""What holds for every rule: order, one mind, translation, bounded harm, small memory."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dare_agg.codec.mask import Mask, parse_drop_rate
from dare_agg.codec.masked import MaskedSource
from dare_agg.errors import MergeError
from dare_agg.robust.aggregate import aggregate, bounded
from dare_agg.robust.momentum import Momentum, moved
from dare_agg.robust.rule import robust_rule
from dare_agg.robust.stages import STAGES
from dare_agg.vectors.sources import array_source

N, F, SIZE = 11, 2, 40
RULES = (
    "median", "trimmed-mean", "krum", "multi-krum", "geometric-median", "centered-clipping",
    "nnm+trimmed-mean", "nnm+median", "norm-bound+nnm+trimmed-mean",
    "nnm+geometric-median", "norm-bound+trimmed-mean",
)  # fmt: skip
# Rules of distances and orders alone: they move with what they are given.
MOVING = ("median", "trimmed-mean", "krum", "multi-krum", "nnm+trimmed-mean")


def result_of(vectors, text, f=F, **words) -> np.ndarray:
    found = aggregate(
        [array_source(np.asarray(v, np.float32)) for v in vectors],
        [1.0] * len(vectors), robust_rule(text, f), **words,
    )  # fmt: skip
    out = np.empty(found.delta.size, np.float32)
    found.delta.read(0, out.size, out)
    return out


def drawn(seed, n=N, size=SIZE):
    return np.random.default_rng(seed).normal(0.2, 1, (n, size)).astype(np.float32)


@pytest.mark.parametrize("text", RULES)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_order_of_clients_does_not_matter(text, seed):
    vectors = drawn(seed)
    order = np.random.default_rng(seed + 1).permutation(N)
    assert np.allclose(result_of(vectors, text), result_of(vectors[order], text), atol=1e-5)


@pytest.mark.parametrize("text", RULES)
def test_a_crowd_of_one_mind_gets_what_it_sent(text):
    vectors = np.repeat(drawn(0)[:1], N, axis=0)
    assert np.allclose(result_of(vectors, text), vectors[0], atol=1e-6)


@pytest.mark.parametrize("text", MOVING)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), far=st.floats(-100, 100, width=32))
def test_what_all_clients_share_passes_through(text, seed, far):
    vectors, shift = drawn(seed), np.full(SIZE, far, np.float32)
    moved_result = result_of(vectors + shift, text)
    assert np.allclose(moved_result, result_of(vectors, text) + shift, atol=1e-3)


@pytest.mark.parametrize("text", RULES)
@pytest.mark.parametrize("far", [10.0, 1e6])
def test_f_clients_move_the_result_no_farther_than_the_honest_ones_reach(text, far):
    """The same bound however far they go: a mean would be moved by far·f/n."""
    vectors = drawn(3)
    vectors[-F:] = far
    honest = vectors[:-F]
    reach = 2 * np.linalg.norm(honest - honest.mean(axis=0), axis=1).max()
    assert np.linalg.norm(result_of(vectors, text) - honest.mean(axis=0)) <= reach


def test_the_mean_itself_is_moved_as_far_as_one_client_likes():
    vectors = drawn(3)
    vectors[-1] = 1e6
    assert np.linalg.norm(vectors.mean(axis=0)) > 1e5


def test_without_byzantine_clients_a_trimmed_mean_of_all_is_the_mean():
    """f = 0, which no run may ask for: the rules that cut by f cut nothing."""
    from dare_agg.robust.votes import trimmed_mean

    vectors = drawn(1).astype(np.float64)
    assert np.allclose(trimmed_mean(vectors, 0), vectors.mean(axis=0))


@pytest.mark.parametrize("name", ["nnm", "multi-krum"])
def test_without_byzantine_clients_all_are_neighbours(name):
    from dare_agg.robust.mixture import mixture_of

    vectors = drawn(1).astype(np.float64)
    mixture, row = mixture_of(vectors @ vectors.T, np.ones(N)), STAGES[name]
    if row.change is not None:
        parts = row.change(mixture, 0, {}, np.random.default_rng(0)).parts
    else:
        assert row.combine is not None
        parts = row.combine(mixture, 0, {"keep": 0, "near": 0})[None]
    assert np.allclose(parts, 1 / N)


def test_one_honest_client_among_those_that_send_nothing_wins_no_vote():
    vectors = np.zeros((5, SIZE), np.float32)
    vectors[0] = 1
    assert not result_of(vectors, "nnm+trimmed-mean", f=1).any()
    assert not result_of(vectors, "median", f=2).any()


def test_buckets_follow_the_seed():
    vectors = drawn(5)
    first, again, other = (
        result_of(vectors, "bucketing+median", f=1, seed=(seed,)) for seed in (1, 1, 2)
    )
    assert first.tobytes() == again.tobytes() != other.tobytes()


# --- survivors under masks -----------------------------------------------------------------


def masked(values, p="0.9", key=bytes(16), size=200_000):
    mask = Mask("stratified", size, parse_drop_rate(p), key)
    return MaskedSource(mask, values[: mask.survivors].astype(np.float32))


def test_survivors_alone_give_what_whole_vectors_give():
    rng = np.random.default_rng(0)
    sources = [masked(rng.normal(size=20_000)) for _ in range(7)]
    whole = []
    for source in sources:
        out = np.empty(source.size, np.float32)
        source.read(0, out.size, out)
        whole.append(array_source(out))
    rule = robust_rule("norm-bound+nnm+trimmed-mean", 2)
    sparse, dense = (aggregate(each, [1] * 7, rule).delta for each in (sources, whole))
    assert sparse.survivors == 20_000
    a, b = np.empty(sparse.size, np.float32), np.empty(sparse.size, np.float32)
    sparse.read(0, a.size, a)
    dense.read(0, b.size, b)
    assert np.allclose(a, b, atol=1e-5)
    # Wherever a tile is cut, the bits are the same.
    cut = np.empty_like(a)
    for lo in range(0, a.size, 7_919):
        sparse.read(lo, min(a.size, lo + 7_919), cut[lo : lo + 7_919])
    assert cut.tobytes() == a.tobytes()


def test_updates_of_other_elements_are_refused():
    rng = np.random.default_rng(0)
    sources = [masked(rng.normal(size=20_000), key=bytes([i]) * 16) for i in range(5)]
    with pytest.raises(MergeError, match="one mask and one drop rate"):
        aggregate(sources, [1] * 5, robust_rule("median", 2))
    # A bound reads each by itself.
    found = bounded(sources, [1, 1, 1, 1, 90], robust_rule("norm-bound(limit=1)+weight-bound", 2))
    assert np.allclose(np.array(found.norms) * found.factors, 1)
    assert found.weights == (1, 1, 1, 1, 1)


def test_too_few_updates_are_refused():
    with pytest.raises(MergeError, match="4 updates; 'median' bears 2"):
        result_of(drawn(0)[:4], "median")


def test_memory_is_that_of_a_tile_a_client():
    size, n = 4_000_000, 8
    sources = [masked(np.ones(400_000) * i, size=size) for i in range(n)]
    rule = robust_rule("nnm+trimmed-mean", 2)
    tracemalloc.start()
    found = aggregate(sources, [1] * n, rule)
    out = np.empty(1 << 16, np.float32)
    for lo in range(0, size, 1 << 16):
        hi = min(size, lo + (1 << 16))
        found.delta.read(lo, hi, out[: hi - lo])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # All survivors in float64 would be 25.6 MB, all rows 128 MB.
    assert peak < 16e6


# --- momentum ------------------------------------------------------------------------------


def test_momentum_is_a_corrected_mean_of_what_a_client_sent():
    beta, deltas = 0.9, drawn(7, n=6)
    momentum = None
    for delta in deltas:
        momentum = moved(momentum, array_source(delta), beta)
    powers = beta ** np.arange(5, -1, -1)
    expected = (powers[:, None] * deltas).sum(axis=0) / powers.sum()
    assert np.allclose(momentum.vector * momentum.correction(beta), expected, atol=1e-6)


def test_the_rule_votes_on_momenta_and_hands_them_on():
    vectors = drawn(8)
    rule = robust_rule("momentum+trimmed-mean", F)
    sources = [array_source(v) for v in vectors]
    first = aggregate(sources, [1] * N, rule, momenta=[None] * N)
    out = np.empty(SIZE, np.float32)
    first.delta.read(0, SIZE, out)
    # Corrected, the first round counts in full.
    assert np.allclose(out, result_of(vectors, "trimmed-mean"), atol=1e-5)
    before = [Momentum(one.vector.copy(), one.rounds) for one in first.momenta]
    second = aggregate(sources, [1] * N, rule, momenta=first.momenta)
    assert [one.rounds for one in second.momenta] == [2] * N
    assert all(a.vector.tobytes() == b.vector.tobytes()
               for a, b in zip(before, first.momenta, strict=True))  # fmt: skip

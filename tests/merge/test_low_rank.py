"""The mean of products: exact where the rank holds it, the best of its rank where it does not."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dare_agg.errors import MergeError
from dare_agg.merge.low_rank import mean_of_products


def pairs(seed, count, rank, m, n, *, spread=1.0):
    """Clients' factors around a common start."""
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((rank, n)), rng.standard_normal((m, rank))
    return [
        (
            (b + spread * rng.standard_normal(b.shape)).astype(np.float32),
            (a + spread * rng.standard_normal(a.shape)).astype(np.float32),
        )
        for _ in range(count)
    ]


def exact(found, weights):
    return sum(
        w * b.astype(np.float64) @ a.astype(np.float64)
        for (b, a), w in zip(found, weights, strict=True)
    )


def measured(merged, right):
    ours = merged.b.astype(np.float64) @ merged.a.astype(np.float64)
    return np.linalg.norm(right - ours) / np.linalg.norm(right)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6), count=st.integers(1, 5), rank=st.integers(1, 6),
    m=st.integers(6, 40), n=st.integers(6, 40), spread=st.sampled_from([1e-3, 0.1, 1.0, 10.0]),
)  # fmt: skip
def test_it_is_the_best_of_its_rank_and_its_error_is_the_one_measured(
    seed, count, rank, m, n, spread
):
    clients = pairs(seed, count, rank, m, n, spread=spread)
    weights = np.random.default_rng(seed).dirichlet(np.ones(count)).tolist()
    right = exact(clients, weights)
    merged = mean_of_products(clients, weights)
    assert merged.b.shape == (m, rank) and merged.a.shape == (rank, n)
    s = np.linalg.svd(right, compute_uv=False)
    best = np.linalg.norm(s[rank:]) / np.linalg.norm(s)
    assert merged.error == pytest.approx(best, rel=1e-6, abs=1e-7)
    assert measured(merged, right) == pytest.approx(merged.error, rel=1e-4, abs=2e-6)


def test_ranks_that_fit_into_the_common_one_are_merged_exactly():
    """Clients of ranks 2, 4, 2 in disjoint components of rank 8."""
    rng = np.random.default_rng(0)
    clients, at = [], 0
    for own in (2, 4, 2):
        b, a = np.zeros((30, 8), np.float32), np.zeros((8, 20), np.float32)
        b[:, at : at + own] = rng.standard_normal((30, own))
        a[at : at + own] = rng.standard_normal((own, 20))
        clients.append((b, a))
        at += own
    weights = [0.5, 0.3, 0.2]
    merged = mean_of_products(clients, weights)
    assert merged.rank == 8 and merged.error < 1e-12
    assert measured(merged, exact(clients, weights)) < 1e-6


def test_equal_clients_stay_where_they_are():
    (pair,) = pairs(1, 1, 4, 20, 30)
    merged = mean_of_products([pair, pair, pair], [0.2, 0.3, 0.5])
    assert np.allclose(merged.b, pair[0], atol=1e-5) and np.allclose(merged.a, pair[1], atol=1e-5)


def test_factors_stay_near_the_mean_of_the_factors():
    clients = pairs(2, 3, 4, 24, 24, spread=0.05)
    merged = mean_of_products(clients, [1 / 3] * 3)
    mean_b, mean_a = (np.mean([c[i] for c in clients], axis=0) for i in (0, 1))
    for ours, mean in ((merged.b, mean_b), (merged.a, mean_a)):
        assert np.linalg.norm(ours - mean) < 0.1 * np.linalg.norm(mean)


def test_components_that_nobody_used_keep_their_start():
    """At the start B is zero: A must not be lost where no client has moved its B."""
    rng = np.random.default_rng(3)
    a = rng.standard_normal((4, 20)).astype(np.float32)
    b = np.zeros((10, 4), np.float32)
    b[:, 0] = 1
    merged = mean_of_products([(b, a), (b, a)], [0.5, 0.5])
    assert merged.rank == 1 and np.linalg.matrix_rank(merged.a) == 4
    assert np.allclose(merged.a, a, atol=1e-5) and np.allclose(merged.b, b, atol=1e-5)
    none = mean_of_products([(np.zeros_like(b), a)], [1.0])
    assert none.error == 0 and none.rank == 0
    assert np.array_equal(none.a, a) and not none.b.any()


def test_the_order_of_weights_and_what_cannot_be():
    clients = pairs(4, 3, 2, 8, 8)
    with pytest.raises(MergeError, match="pairs of one shape and a weight each"):
        mean_of_products(clients, [0.5, 0.5])
    with pytest.raises(MergeError, match="pairs of one shape"):
        mean_of_products([clients[0], pairs(5, 1, 3, 8, 8)[0]], [0.5, 0.5])
    with pytest.raises(MergeError, match="pairs of one shape"):
        mean_of_products([], [])
    broken = clients[0][0] * np.float32(np.nan)
    with pytest.raises(MergeError, match="lower the learning rate"):
        mean_of_products([(broken, clients[0][1])], [1.0])

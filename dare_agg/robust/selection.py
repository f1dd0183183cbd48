"""Rules whose result is a combination of the vectors: how much of each is in it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from dare_agg.robust.mixture import Mixture, Numbers

# A distance below this share of the median one counts as that share: Weiszfeld divides by it.
_LEAST_SHARE = 1e-9


def mean(mixture: Mixture, f: int, numbers: Mapping[str, float]) -> Numbers:
    """The weighted mean."""
    return mixture.weights / mixture.weights.sum()


def krum(mixture: Mixture, f: int, numbers: Mapping[str, float]) -> Numbers:
    """The one vector of the best score."""
    return _mean_of(mixture, krum_order(mixture, f, int(numbers["near"]))[:1])


def multi_krum(mixture: Mixture, f: int, numbers: Mapping[str, float]) -> Numbers:
    """The mean of the vectors of the best scores."""
    kept = int(numbers["keep"]) or mixture.count - f
    return _mean_of(mixture, krum_order(mixture, f, int(numbers["near"]))[:kept])


def krum_order(mixture: Mixture, f: int, near: int) -> np.ndarray:
    """The vectors by Krum's score, the sum of squared distances to the ``near`` nearest others."""
    distances = mixture.squared_distances()
    np.fill_diagonal(distances, -1)
    others = np.sort(distances, axis=1)[:, 1:]
    scores = others[:, : near or max(1, mixture.count - f - 2)].sum(axis=1)
    return np.argsort(scores, kind="stable")


def geometric_median(mixture: Mixture, f: int, numbers: Mapping[str, float]) -> Numbers:
    """Weiszfeld's iteration, from 0."""
    shares = np.zeros(mixture.count)
    for _ in range(int(numbers["steps"])):
        distances = mixture.distances_to(shares)
        middle = float(np.median(distances))
        if middle == 0:
            break
        pulls = 1 / np.maximum(distances, _LEAST_SHARE * middle)
        shares = pulls / pulls.sum()
    return shares


def centered_clipping(mixture: Mixture, f: int, numbers: Mapping[str, float]) -> Numbers:
    """Steps from 0 to the mean of what lies within the radius, of the rest as much as that."""
    shares = np.zeros(mixture.count)
    for _ in range(int(numbers["steps"])):
        distances = mixture.distances_to(shares)
        radius = numbers["radius"] or float(np.median(distances))
        reach = np.where(distances > radius, radius / np.where(distances > 0, distances, 1), 1.0)
        shares = shares * (1 - reach.mean()) + reach / mixture.count
    return shares


def _mean_of(mixture: Mixture, chosen: np.ndarray) -> Numbers:
    shares = np.zeros(mixture.count)
    shares[chosen] = 1 / len(chosen)
    return shares

"""What stands before a rule: bounds on norms and weights, nearest neighbours, buckets."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from dare_agg.robust.mixture import Mixture


def bounded_norms(
    mixture: Mixture, f: int, numbers: Mapping[str, float], rng: np.random.Generator
) -> Mixture:
    """Vectors longer than the bound, cut to it.

    Of two norms in the middle the lower counts, so that the bound holds between two as well.
    """
    norms = mixture.norms
    bound = numbers["limit"] or numbers["times"] * statistics.median_low(norms.tolist())
    return mixture.scaled(np.where(norms > bound, bound / np.where(norms > 0, norms, 1.0), 1.0))


def bounded_weights(
    mixture: Mixture, f: int, numbers: Mapping[str, float], rng: np.random.Generator
) -> Mixture:
    """No weight above ``times`` their lower median."""
    most = numbers["times"] * statistics.median_low(mixture.weights.tolist())
    return replace(mixture, weights=np.minimum(mixture.weights, most))


def nearest_mixed(
    mixture: Mixture, f: int, numbers: Mapping[str, float], rng: np.random.Generator
) -> Mixture:
    """Each vector as the mean of the n−f nearest to it (NNM); of ties, those of first clients."""
    distances = mixture.squared_distances()
    # Itself comes first, whatever rounding made of its distance to others that are equal to it.
    np.fill_diagonal(distances, -1)
    kept = mixture.count - f
    shares = np.zeros_like(distances)
    nearest = np.argsort(distances, axis=1, kind="stable")[:, :kept]
    np.put_along_axis(shares, nearest, 1 / kept, axis=1)
    return mixture.mixed(shares)


def bucketed(
    mixture: Mixture, f: int, numbers: Mapping[str, float], rng: np.random.Generator
) -> Mixture:
    """Means of buckets of ``size`` vectors, drawn at random; the last may be smaller."""
    size = int(numbers["size"])
    order = rng.permutation(mixture.count)
    buckets = [np.sort(order[at : at + size]) for at in range(0, order.size, size)]
    shares = np.zeros((len(buckets), mixture.count))
    for row, bucket in zip(shares, buckets, strict=True):
        row[bucket] = 1 / bucket.size
    return mixture.mixed(shares)

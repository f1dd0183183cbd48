"""The leading right singular directions of Linears' deltas: their Gram matrices in few numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from dare_agg.codec.derive import Keystream, derive_key
from dare_agg.codec.directions import MAX_RANK
from dare_agg.errors import ConfigError
from dare_agg.merge.by_tensor import Matrix, read_matrix
from dare_agg.merge.linears import Linear
from dare_agg.vectors.one_thread import one_blas_thread
from dare_agg.vectors.sources import DeltaSource

# Steps of subspace iteration, and vectors beyond the rank: the error of direction j falls by
# (σ of the first vector left out / σⱼ)² a step.
_STEPS, _BEYOND = 8, 8
# A direction below this share of the first is rounding.
_LEAST = 1e-6
_START = derive_key(b"dare-agg directions", "start")


def check_rank(rank: int) -> None:
    """Raise `ConfigError` for a number of directions that no update carries."""
    if not 1 <= rank <= MAX_RANK:
        raise ConfigError(f"gram rank = {rank}; 1 to {MAX_RANK} are allowed, for example 8")


def directions_of(
    source: DeltaSource, linears: Mapping[str, Linear], rank: int
) -> Iterator[tuple[str, Matrix, int]]:
    """Yield name, σⱼ·vⱼ of shape (≤ rank, in), and the axis of the inputs, of each Linear.

    One layer is in memory. A tensor without change has none, and is left out. Raises `ConfigError`
    for a rank out of bounds, `MergeError` for values that are not finite.
    """
    check_rank(rank)
    for name, linear in linears.items():
        delta = read_matrix(source, linear.entry, 0, linear.transposed)
        with one_blas_thread():
            found = leading_directions(delta, rank)
        if len(found):
            yield name, found, 0 if linear.transposed else 1


def leading_directions(delta: Matrix, rank: int) -> Matrix:
    """σⱼ·vⱼ of the ``rank`` largest singular values of ``delta``, (≤ rank, in), by size.

    By subspace iteration from a fixed start, exact where ``delta`` is hardly larger than the rank.
    """
    outputs, inputs = delta.shape
    wanted = min(rank, outputs, inputs)
    width = wanted + _BEYOND
    basis = None
    if width < min(outputs, inputs):
        signs = np.unpackbits(Keystream(_START).read(0, -(-inputs * width // 8)))
        basis = (2.0 * signs[: inputs * width] - 1).reshape(inputs, width)
        for _ in range(_STEPS):
            basis, _ = np.linalg.qr(delta.T @ np.linalg.qr(delta @ basis)[0])
    _, sizes, rows = np.linalg.svd(delta if basis is None else delta @ basis, full_matrices=False)
    rows = rows if basis is None else rows @ basis.T
    # What is below this is rounding.
    wanted = min(wanted, int((sizes > max(_LEAST * sizes[0], 1e-30)).sum()))
    rows = sizes[:wanted, None] * rows[:wanted]
    # A direction has no sign: the largest element decides.
    largest = np.abs(rows).argmax(axis=1)
    return rows * np.sign(rows[np.arange(wanted), largest])[:, None]

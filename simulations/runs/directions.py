"""The leading directions of each layer's inputs in a delta, in few bits.

Of a Linear's delta τ (out, in) with τ = Σ σⱼ·uⱼ·vⱼᵀ the rows σⱼ·vⱼ of the largest σⱼ are kept: they
stand for its Gram matrix τᵀτ = Σ σⱼ²·vⱼ·vⱼᵀ in a merge, at a few thousandths of its size.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dare_agg.errors import ConfigError
from dare_agg.vectors.layout import FloatVector, Layout

Directions = Mapping[str, NDArray[np.float32]]
_SCALE_BITS = 32  # of a direction: the size of its codes' step
_ROUNDS = 4  # of subspace iteration
_MORE = 8  # directions that are iterated beyond those asked for


def leading_directions(matrix: NDArray[np.float32], rank: int, seed: int) -> NDArray[np.float32]:
    """The rows σⱼ·vⱼ of the ``rank`` largest singular values, or of all there are, largest first.

    By subspace iteration (Halko et al. 2011, arXiv 0909.4061), its start drawn from the seed.
    """
    most = min(rank + _MORE, *matrix.shape)
    rng = np.random.default_rng(np.random.SeedSequence([seed, 70]))
    basis = rng.standard_normal((matrix.shape[1], most)).astype(np.float32)
    for _ in range(_ROUNDS):
        basis, _ = np.linalg.qr(matrix.T @ (matrix @ basis))
    _, values, right = np.linalg.svd(matrix @ basis, full_matrices=False)
    return (values[:, None] * (right @ basis.T))[: min(rank, most)]


def directions_of(layout: Layout, delta: FloatVector, rank: int) -> Directions:
    """The leading directions of every Linear's delta, by tensor name."""
    from dare_agg.merge.linears import AVERAGED, LINEARS
    from dare_agg.vectors.patterns import compile_patterns, matches

    wanted, averaged = compile_patterns([LINEARS]), compile_patterns([AVERAGED])
    return {
        entry.name: leading_directions(
            np.asarray(delta[entry.offset : entry.stop]).reshape(entry.shape),
            rank,
            zlib.crc32(entry.name.encode()),
        )
        for entry in layout.entries
        if len(entry.shape) == 2
        and matches(entry.name, wanted)
        and not matches(entry.name, averaged)
    }


def sent_directions(exact: Directions, rank: int, bits: int) -> tuple[Directions, int]:
    """Return the first ``rank`` directions of each layer as they arrive, and the bits they took.
    Each is rounded to 2^(bits−1) − 1 levels a side of its largest magnitude, whose step is a
    float32. Raises `ConfigError` for fewer than 2 bits, which leave no level.
    float32. Raises `ConfigError` for fewer than 2 bits, which leave no level.
    """
    if not 2 <= bits <= 16:
        raise ConfigError(f"directions of {bits} bits; 2 to 16 are possible")
    levels = np.float32((1 << (bits - 1)) - 1)
    found: dict[str, NDArray[np.float32]] = {}
    spent = 0
    for name, rows in exact.items():
        kept = rows[:rank]
        step = np.abs(kept).max(axis=1, keepdims=True, initial=0) / levels
        codes = np.rint(kept / np.where(step > 0, step, 1))
        found[name] = (codes * step).astype(np.float32)
        spent += kept.size * bits + len(kept) * _SCALE_BITS
    return found, spent


def kept_directions(path: Path, layout: Layout, delta: FloatVector, rank: int) -> Directions:
    """The leading directions of a delta, from the file at ``path``, which is made where missing."""
    from safetensors.numpy import load_file, save

    from dare_agg.files.atomic import replace_file

    if not path.is_file():
        replace_file(path, (save(dict(directions_of(layout, delta, rank))),))
    return load_file(str(path))

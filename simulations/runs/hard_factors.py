"""Low-rank factors of a delta in few bits: which, in how many, and what arrives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dare_agg.codec.derive import derive_key, seed_secret
from dare_agg.codec.mask import parse_drop_rate
from dare_agg.codec.update import HEADER_BYTES, UpdateSpec, decode_update, encode_update
from dare_agg.vectors.layout import Entry, FloatVector, Layout

Matrix = NDArray[Any]
Pair = tuple[FloatVector, int]  # what arrives, and its bytes
_NOBODY = "0" * 64
_FORMATS = {1: "b1", 2: "b2", 4: "b4", 8: "i8"}
# Bytes of an update's header, and of the scales of its last blocks; bytes of scales an element.
_HEADER, _SCALES = 160, 4 / 1024
# Groups of Delta-CoMe: directions from the first on, and bits.
_GROUPS = ((2, 8), (32, 3), (1 << 30, 2))


def coded(delta: FloatVector, rate: Any, values: str, seed: int, rates: Any = None) -> Pair:
    """A delta as the library's update brings it, and the update's bytes."""
    key = derive_key(seed_secret(seed), "hard")
    spec = UpdateSpec(
        delta.size, rate, "stratified", key, key, 0, values, _NOBODY, _NOBODY, rates=rates
    )
    blob = encode_update(spec, delta)
    out = np.empty(delta.size, np.float32)
    decode_update(blob, spec).read(0, delta.size, out)
    return out, len(blob)


def _whole(values: FloatVector, form: str, seed: int) -> Pair:
    """All of some values in few bits; zeros fill the last block, whose rest would travel whole."""
    padded = np.pad(values, (0, -values.size % 32)).astype(np.float32)
    moved, size = coded(padded, parse_drop_rate(0), form, seed)
    return moved[: values.size], size


def factors(
    delta: FloatVector,
    layout: Layout,
    nbytes: int,
    seed: int,
    bits: int,
) -> Pair:
    """The leading singular directions over all matrices that fit, and small tensors whole.

    Elements take ``bits``, a direction's scale 16, found by least squares after coding. Which
    directions travel is said by what they hold of Σδ² a byte; a tensor that is no matrix competes
    in one bit an element.
    """
    found: dict[str, tuple[Matrix, Matrix]] = {}
    offered: list[tuple[float, str, int, float]] = []
    for entry in layout.entries:
        part = delta[entry.offset : entry.stop].astype(np.float64)
        length = float(part @ part)
        if not length:
            continue
        if not is_matrix(entry):
            cost = entry.size * (1 / 8 + _SCALES) + 2
            offered.append((length / cost, entry.name, -1, cost))
            continue
        matrix = part.reshape(entry.shape[0], -1)
        left, held, right = directions(matrix)
        found[entry.name] = left, right
        cost = sum(matrix.shape) * (bits / 8 + _SCALES) + 2
        offered += [(h / cost, entry.name, k, cost) for k, h in enumerate(held.tolist())]
    offered.sort(key=lambda one: (-one[0], one[1], one[2]))
    chosen: dict[str, int] = {}
    whole: list[str] = []
    room = float(nbytes - _HEADER)
    for worth, name, number, cost in offered:
        if cost > room or worth <= 0 or number > chosen.get(name, 0):
            continue
        room -= cost
        if number < 0:
            whole.append(name)
        else:
            chosen[name] = number + 1
    ranks = {name: chosen[name] for name in found if name in chosen}
    out, size = _factors(delta, layout, ranks, found, _FORMATS[bits], seed)
    if whole:
        entries = [layout[name] for name in sorted(whole)]
        parts = [delta[entry.offset : entry.stop] for entry in entries]
        # Of one size: blocks of the code cross them.
        sizes = [np.float32(np.float16(np.sqrt(np.mean(np.square(part))))) for part in parts]
        scales = np.repeat(np.maximum(sizes, np.float32(1e-7)), [entry.size for entry in entries])
        moved, more = _whole(np.concatenate(parts) / scales, "b1", seed)
        moved *= scales
        for entry, end in zip(entries, np.cumsum([e.size for e in entries]).tolist(), strict=True):
            out[entry.offset : entry.stop] = moved[end - entry.size : end]
        # One header would do for both.
        size += more + 2 * len(entries) - HEADER_BYTES * bool(ranks)
    return out, size


def is_matrix(entry: Entry) -> bool:
    """Whether a tensor has two sides of at least 32, of which few directions are less."""
    return len(entry.shape) >= 2 and min(entry.shape[0], entry.size // entry.shape[0]) >= 32


def directions(matrix: Matrix) -> tuple[Matrix, Matrix, Matrix]:
    """Left vectors (out, k), σ² and σ·right vectors (k, in), the largest first; M = Σ of both."""
    if matrix.shape[0] > matrix.shape[1]:
        right, held, left = directions(matrix.T)
        return left.T, held, right.T
    held, left = np.linalg.eigh(matrix @ matrix.T)
    order = np.argsort(held)[::-1]
    left = left[:, order]
    return left, np.maximum(held[order], 0), left.T @ matrix


def _factors(
    delta: FloatVector,
    layout: Layout,
    ranks: Mapping[str, int],
    found: Mapping[str, tuple[Matrix, Matrix]],
    values: str,
    seed: int,
) -> Pair:
    """The first directions of each matrix, coded; their scales are found after that."""
    out = np.zeros(delta.size, np.float32)
    if not ranks:
        return out, 0
    parts = []
    for name, rank in ranks.items():
        left, right = found[name]
        for vectors in (left[:, :rank].T, right[:rank]):
            lengths = np.sqrt(np.square(vectors).mean(axis=1, keepdims=True))
            parts.append(vectors / np.maximum(lengths, 1e-30))
    flat = np.concatenate([part.ravel() for part in parts]).astype(np.float32)
    moved, size = _whole(flat, values, seed)
    at = 0
    for name, rank in ranks.items():
        entry = layout[name]
        matrix = delta[entry.offset : entry.stop].reshape(entry.shape[0], -1)
        sides = []
        for width in matrix.shape:
            sides.append(moved[at : at + rank * width].reshape(rank, -1))
            at += rank * width
        scales = fitted_scales(matrix, *sides)
        out[entry.offset : entry.stop] = ((sides[0] * scales[:, None]).T @ sides[1]).ravel()
        size += 2 * rank
    return out, size


def fitted_scales(matrix: Matrix, left: Matrix, right: Matrix) -> FloatVector:
    """s of least ‖M − Σ sₖ·leftₖ·rightₖᵀ‖ for given directions, as binary16 holds it."""
    gram = (left @ left.T) * (right @ right.T)
    wanted = np.einsum("km,mn,kn->k", left, matrix, right, optimize=True)
    ridge = 1e-6 * np.trace(gram) / len(gram) * np.eye(len(gram))
    found = np.linalg.solve((gram + ridge).astype(np.float64), wanted.astype(np.float64))
    return found.astype(np.float16).astype(np.float32)


def delta_come(delta: FloatVector, layout: Layout, nbytes: int) -> Pair:
    """Delta-CoMe (Ping et al. 2024, 2406.08903): singular directions in 8, then 3, then 2 bits.

    Every matrix has the same bits a parameter; levels are evenly spaced between a direction's
    least and largest element (the paper's GPTQ needs texts and is left out).
    """
    matrices = [entry for entry in layout.entries if is_matrix(entry)]
    share = (nbytes - 16) / max(1, sum(entry.size for entry in matrices))
    out, size = np.zeros(delta.size, np.float32), 16
    for entry in matrices:
        matrix = delta[entry.offset : entry.stop].reshape(entry.shape[0], -1).astype(np.float64)
        left, held, right = directions(matrix)
        rows = np.sqrt(np.square(right).sum(1, keepdims=True))
        scale = np.sqrt(np.maximum(rows, 1e-30))
        # σ is shared by both sides, as in the paper's U·Σ^½ and Σ^½·V.
        left, right = left.T * scale, right / scale
        room, moved = share * entry.size, np.zeros(matrix.shape)
        for number in range(len(held)):
            bits = next(bits for last, bits in _GROUPS if number < last)
            cost = sum(matrix.shape) * bits / 8 + 8  # two binary16 ends a side
            if cost > room:
                break
            room, size = room - cost, size + int(np.ceil(cost))
            moved += np.outer(_evenly(left[number], bits), _evenly(right[number], bits))
        out[entry.offset : entry.stop] = moved.astype(np.float32).ravel()
    return out, size


def _evenly(vector: Matrix, bits: int) -> Matrix:
    least, most = np.float16(vector.min()), np.float16(vector.max())
    step = (float(most) - float(least)) / ((1 << bits) - 1)
    if not step > 0:
        return vector
    return float(least) + step * np.clip(
        np.rint((vector - float(least)) / step), 0, (1 << bits) - 1
    )

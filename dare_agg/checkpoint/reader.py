"""Checkpoints: safetensors files and Hugging Face folders, read mapped and written atomically.

Tensors are never loaded whole: a reader converts the tile it is asked for from the mapped
file (bfloat16, float16 and float32, without any dtype package), and the writer rounds and
writes tile by tile into a draft that is renamed when complete.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dare_agg.checkpoint.fingerprints import recall, remember
from dare_agg.errors import CheckpointError, LayoutError, NonFiniteError
from dare_agg.vectors.layout import FingerprintStream, FloatVector, Layout, layout_of
from dare_agg.vectors.rounded import bfloat16_bits

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
FLOAT_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8"}
DTYPE_WORDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
# Bits of the exponent: all set means NaN or infinity.
_EXPONENT = {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}
_SUFFIX = ".safetensors"
_FINITE_BLOCK = 1 << 16


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: bytes ``start`` to ``stop`` of ``file``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def is_float(self) -> bool:
        """Whether its values are floating point, so that a delta can be formed."""
        return self.dtype in FLOAT_DTYPES


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk, its tensors mapped, not loaded. `open_checkpoint` makes one."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str] = field(default_factory=dict)
    _maps: dict[Path, NDArray[np.uint8]] = field(
        default_factory=dict, init=False, repr=False, compare=False, hash=False
    )
    # By the layout's: hashing takes longer than a sparse merge.
    _fingerprints: dict[str, str] = field(
        default_factory=dict, init=False, repr=False, compare=False, hash=False
    )

    @property
    def folder(self) -> Path | None:
        """The Hugging Face folder, or None for a single file."""
        return self.path if self.path.is_dir() else None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, those that are no parameters included, in the file's order."""
        return tuple(self.tensors)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by name, as `layout_of` takes them."""
        return {name: info.shape for name, info in self.tensors.items()}

    @property
    def dtypes(self) -> dict[str, str]:
        """Dtypes by name, in safetensors' words (``BF16``)."""
        return {name: info.dtype for name, info in self.tensors.items()}

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """The safetensors files, sorted."""
        return tuple(sorted({info.file for info in self.tensors.values()}))

    @property
    def weights(self) -> tuple[str, ...]:
        """The names of the files that hold the tensors."""
        return tuple(file.name for file in self.files)

    def layout(self, exclude: Iterable[str] = (), without: Collection[str] = ()) -> Layout:
        """Lay out the floating-point tensors but those of ``without``; the others are buffers."""
        others = {name for name, info in self.tensors.items() if not info.is_float}
        return layout_of(self.shapes, exclude=exclude, buffers=others.union(without))

    def raw(self, name: str) -> NDArray[np.generic]:
        """Return a tensor's elements, flat, as stored (bfloat16 as uint16), mapped read-only.

        In files whose header ends at an odd place they are not aligned in memory.
        """
        info = self.tensors[name]
        if info.file not in self._maps:
            self._maps[info.file] = np.memmap(info.file, np.uint8, "r")
        data = self._maps[info.file][info.start : info.stop]
        if not info.is_float:
            return np.asarray(data)
        return np.asarray(data.view(FLOAT_DTYPES[info.dtype]))

    def release(self) -> None:
        """Hand the mapped pages back to the system; what is read again is mapped again.

        Keeps the resident size of one pass over a large model small.
        """
        for mapped in self._maps.values():
            pages = getattr(mapped, "_mmap", None)
            if pages is not None and hasattr(mmap, "MADV_DONTNEED"):
                pages.madvise(mmap.MADV_DONTNEED)

    def array(self, name: str) -> NDArray[np.float32]:
        """Return one tensor as float32, in its shape."""
        info = self.tensors[name]
        out = np.empty(info.size, np.float32)
        widen(self.raw(name), info.dtype, out)
        return out.reshape(info.shape)

    def vector(self, layout: Layout) -> FloatVector:
        """Return the whole model as one flat float32 vector (in memory)."""
        out = np.empty(layout.size, np.float32)
        self.reader(layout).read(0, layout.size, out)
        return out

    def reader(self, layout: Layout) -> CheckpointReader:
        """Return the model over ``layout`` as a source of tiles.

        Raises `LayoutError` naming the first tensor that is missing or has another shape.
        """
        self.check_layout(layout)
        return CheckpointReader(self, layout)

    def check_layout(self, layout: Layout) -> None:
        """Raise `LayoutError` unless all of ``layout`` is here: names, shapes, floating point."""
        for entry in layout.entries:
            info = self.tensors.get(entry.name)
            if info is None:
                raise LayoutError(
                    f"{self.path}: tensor {entry.name!r} is missing; exclude it by a pattern if "
                    "it is no shared parameter"
                )
            if info.shape != entry.shape:
                raise LayoutError(
                    f"{self.path}: tensor {entry.name!r} has shape {info.shape}, the base has "
                    f"{entry.shape}; merge models of one architecture and vocabulary"
                )
            if not info.is_float:
                raise LayoutError(
                    f"{self.path}: tensor {entry.name!r} has dtype {info.dtype}; "
                    f"{', '.join(FLOAT_DTYPES)} can be merged: convert it first"
                )

    def fingerprint(self, layout: Layout | None = None) -> str:
        """SHA-256 (hex) of the parameters, as `dare_agg.vectors.layout.fingerprint`.

        Remembered on this machine while the files do not change.
        """
        chosen = self.layout() if layout is None else layout
        known = self._fingerprints.get(chosen.fingerprint)
        known = known or recall(self.files, chosen.fingerprint)
        if known is not None:
            return self._fingerprints.setdefault(chosen.fingerprint, known)
        stream, reader = FingerprintStream(chosen), self.reader(chosen)
        tile = np.empty(1 << 18, np.float32)
        for lo in range(0, chosen.size, tile.size):
            piece = tile[: min(chosen.size, lo + tile.size) - lo]
            reader.read(lo, lo + piece.size, piece)
            stream.update(piece)
        found = stream.hexdigest()
        remember(self.files, chosen.fingerprint, found)
        return self._fingerprints.setdefault(chosen.fingerprint, found)

    def check_finite(self, layout: Layout) -> None:
        """Raise `NonFiniteError` naming the first tensor and index that is NaN or infinite."""
        for entry in layout.entries:
            info, stored = self.tensors[entry.name], self.raw(entry.name)
            if info.dtype == "F64":
                bad = ~np.isfinite(stored)
                first = int(np.argmax(bad)) if bad.any() else -1
            else:
                first = first_nonfinite(stored, _EXPONENT[info.dtype])
            if first >= 0:
                index = tuple(int(i) for i in np.unravel_index(first, info.shape or (1,)))
                value = np.empty(1, np.float32)
                widen(stored[first : first + 1], info.dtype, value)
                raise NonFiniteError(
                    f"{self.path}: {value[0]} in tensor {entry.name!r} at index {index}; only "
                    "finite values can be merged: check how the model was trained"
                )


def first_nonfinite(stored: NDArray, exponent: int) -> int:
    """Index of the first element with all ``exponent`` bits set, -1 for none."""
    bits = stored.view(f"<u{stored.dtype.itemsize}")
    signed = stored.view(f"<i{stored.dtype.itemsize}")
    mask, sign = bits.dtype.type(exponent), 1 << (8 * stored.dtype.itemsize - 1)
    for lo in range(0, bits.size, _FINITE_BLOCK):
        piece = bits[lo : lo + _FINITE_BLOCK]
        # As integers, positive numbers sort like themselves and negative ones (unsigned) by
        # size: two maxima say whether any exponent is full, without a temporary.
        largest = signed[lo : lo + _FINITE_BLOCK].max()
        if largest >= exponent or piece.max() >= sign + exponent:
            return lo + int(np.argmax((piece & mask) == mask))
    return -1


def widen(stored: NDArray, dtype: str, out: FloatVector) -> None:
    """Convert stored elements (bfloat16 as uint16) to float32 into ``out``."""
    if dtype == "BF16":
        bits = out.view(np.uint32)
        bits[:] = stored
        np.left_shift(bits, np.uint32(16), out=bits)
    else:
        out[:] = stored


def narrow(values: FloatVector, dtype: str) -> NDArray[np.generic]:
    """Round float32 to a stored dtype (to nearest, ties to even; bfloat16 as uint16)."""
    if dtype == "BF16":
        return bfloat16_bits(values)
    with np.errstate(over="ignore"):
        return values.astype(FLOAT_DTYPES[dtype], copy=False)


@dataclass(frozen=True)
class CheckpointReader:
    """A checkpoint over a layout, readable in any part as float32 (a `DeltaSource`)."""

    checkpoint: Checkpoint
    layout: Layout
    _raw: dict[str, tuple[NDArray, str]] = field(
        default_factory=dict, init=False, repr=False, compare=False, hash=False
    )

    @property
    def size(self) -> int:
        return self.layout.size

    def stored(self, name: str) -> tuple[NDArray, str]:
        """Return a tensor's stored elements and dtype."""
        found = self._raw.get(name)
        if found is None:
            found = self.checkpoint.raw(name), self.checkpoint.tensors[name].dtype
            self._raw[name] = found
        return found

    def read(self, lo: int, hi: int, out: FloatVector) -> None:
        """Overwrite ``out`` with the parameters ``lo`` to ``hi``."""
        for entry, first, last in self.layout.pieces(lo, hi):
            stored, dtype = self.stored(entry.name)
            at = entry.offset - lo
            widen(stored[first:last], dtype, out[at + first : at + last])

    def take(self, positions: NDArray[np.int64]) -> FloatVector:
        """Return the parameters at ascending positions."""
        out = np.empty(positions.size, np.float32)
        for entry, first, last in self.layout.runs(positions):
            stored, dtype = self.stored(entry.name)
            at = positions[first:last] - entry.offset
            # ``take``, which is faster, would copy a tensor that is not aligned.
            picked = stored.take(at) if stored.flags.aligned else stored[at]
            widen(picked, dtype, out[first:last])
        return out


def parse_dtype(word: str) -> str:
    """Return the safetensors dtype of "float32", "bfloat16", "float16".

    Raises `CheckpointError` for another word.
    """
    if word in DTYPE_WORDS:
        return DTYPE_WORDS[word]
    raise CheckpointError(f"dtype {word!r} is unknown; known: {', '.join(DTYPE_WORDS)}")

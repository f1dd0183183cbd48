"""Named tensors as one flat float32 vector.

A `Layout` fixes which tensors of a model take part, and where each begins in the flat
vector. Tensors are ordered by the UTF-8 bytes of their names, so the order in which a
framework happens to list them does not matter. Names that match an exclusion pattern
(task heads) and buffers (not floating point, or named as such) are listed apart: they
are never in a delta.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dare_agg.errors import LayoutError, NonFiniteError
from dare_agg.vectors.patterns import compile_patterns, matches

FloatVector = NDArray[np.float32]


class _Sliced(Protocol):
    """A vector in memory or on disk, read in slices."""

    @property
    def size(self) -> int: ...

    def __getitem__(self, part: slice, /) -> FloatVector: ...


MAX_TENSORS = 1 << 17
MAX_NAME_BYTES = 4096
MAX_DIMENSIONS = 16
MAX_PARAMETERS = 1 << 40


@dataclass(frozen=True)
class Entry:
    """One tensor of a layout: elements ``offset`` to ``offset + size`` of the vector."""

    name: str
    shape: tuple[int, ...]
    offset: int
    size: int

    @property
    def stop(self) -> int:
        """The first element behind the tensor."""
        return self.offset + self.size


@dataclass(frozen=True)
class Layout:
    """Names, shapes and offsets of the tensors in the flat vector, in order.

    ``excluded`` are the names kept out by pattern (heads), ``buffers`` those that are no
    parameters. Make one with `layout_of`.
    """

    entries: tuple[Entry, ...]
    excluded: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()
    _by_name: dict[str, Entry] = field(init=False, repr=False, compare=False, hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_name", {e.name: e for e in self.entries})

    @property
    def size(self) -> int:
        """Number of parameters in the flat vector."""
        return self.entries[-1].stop if self.entries else 0

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors in the vector, in order."""
        return tuple(e.name for e in self.entries)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Elements of the tensors in the vector, in order."""
        return tuple(e.size for e in self.entries)

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def __getitem__(self, name: str) -> Entry:
        return self._by_name[name]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over names and shapes; equal layouts have equal fingerprints."""
        digest = hashlib.sha256(b"dare-agg layout 1\0")
        for entry in self.entries:
            digest.update(_canonical_header(entry))
        return digest.hexdigest()

    def pieces(self, start: int, stop: int) -> Iterator[tuple[Entry, int, int]]:
        """Yield ``(entry, lo, hi)``: the part of each tensor inside ``[start, stop)``.

        ``lo`` and ``hi`` count within the tensor.
        """
        for entry in self.entries[self._first_at(start) :]:
            if entry.offset >= stop:
                break
            lo, hi = max(start, entry.offset), min(stop, entry.stop)
            if lo < hi:
                yield entry, lo - entry.offset, hi - entry.offset

    def runs(self, positions: NDArray[np.int64]) -> Iterator[tuple[Entry, int, int]]:
        """Yield ``(entry, first, last)``: which of these ascending positions lie in each tensor."""
        if not positions.size:
            return
        first = 0
        for entry, _, _ in self.pieces(int(positions[0]), int(positions[-1]) + 1):
            last = int(np.searchsorted(positions, entry.stop))
            if last > first:
                yield entry, first, last
                first = last

    def _first_at(self, position: int) -> int:
        lo, hi = 0, len(self.entries)
        while lo < hi:
            mid = (lo + hi) // 2
            if self.entries[mid].stop <= position:
                lo = mid + 1
            else:
                hi = mid
        return lo

    def flatten(
        self, arrays: Mapping[str, NDArray[np.generic]], out: FloatVector | None = None
    ) -> FloatVector:
        """Copy ``arrays`` into one float32 vector of ``size`` elements.

        Raises `LayoutError` for a missing name, another shape or a dtype that is not
        floating point.
        """
        vector = np.empty(self.size, np.float32) if out is None else out
        if vector.shape != (self.size,) or vector.dtype != np.float32:
            raise LayoutError(
                f"vector has shape {vector.shape} and dtype {vector.dtype}; "
                f"this layout needs ({self.size},) float32"
            )
        for entry in self.entries:
            vector[entry.offset : entry.stop] = self.tensor(arrays, entry).reshape(-1)
        return vector

    def tensor(
        self, arrays: Mapping[str, NDArray[np.generic]], entry: Entry
    ) -> NDArray[np.generic]:
        """The array of one entry; raises as `flatten`."""
        if entry.name not in arrays:
            raise LayoutError(f"tensor {entry.name!r} is missing; the layout needs it")
        array = np.asarray(arrays[entry.name])
        if array.shape != entry.shape:
            raise LayoutError(
                f"tensor {entry.name!r} has shape {array.shape}; the layout has {entry.shape}"
            )
        if array.dtype.kind != "f":
            raise LayoutError(
                f"tensor {entry.name!r} has dtype {array.dtype}; a floating-point dtype is "
                "needed (name it in buffers, or exclude it)"
            )
        return array

    def unflatten(
        self, vector: FloatVector, dtypes: Mapping[str, np.dtype] | None = None
    ) -> dict[str, NDArray[np.generic]]:
        """Cut the vector into named arrays (views where the dtype stays float32).

        Raises `LayoutError` for another size.
        """
        if vector.shape != (self.size,):
            raise LayoutError(
                f"vector has shape {vector.shape}; this layout has {self.size} parameters"
            )
        arrays: dict[str, NDArray[np.generic]] = {}
        for entry in self.entries:
            piece = vector[entry.offset : entry.stop].reshape(entry.shape)
            if dtypes is not None and entry.name in dtypes:
                piece = piece.astype(dtypes[entry.name], copy=False)
            arrays[entry.name] = piece
        return arrays


def layout_of(
    shapes: Mapping[str, tuple[int, ...]],
    *,
    exclude: Iterable[str] = (),
    buffers: Iterable[str] = (),
) -> Layout:
    """Lay named shapes out in one flat vector.

    ``exclude`` are regular expressions searched in each name; ``buffers`` are exact names.
    Every name ends up in exactly one of ``entries``, ``excluded``, ``buffers``.

    Raises `LayoutError` for names, shapes or numbers beyond this module's limits.

    >>> layout_of({"b": (2,), "a": (2, 3)}).names
    ('a', 'b')
    """
    patterns = compile_patterns(exclude)
    buffer_names = set(buffers)
    if len(shapes) > MAX_TENSORS:
        raise LayoutError(f"{len(shapes)} tensors; at most {MAX_TENSORS} are allowed")
    entries: list[Entry] = []
    excluded: list[str] = []
    kept_buffers: list[str] = []
    offset = 0
    for name in sorted(shapes, key=lambda n: n.encode()):
        if not name or len(name.encode()) > MAX_NAME_BYTES:
            raise LayoutError(
                f"tensor name {name[:80]!r} has {len(name.encode())} bytes; "
                f"1 to {MAX_NAME_BYTES} are allowed"
            )
        shape = tuple(int(d) for d in shapes[name])
        if len(shape) > MAX_DIMENSIONS or any(d < 0 for d in shape):
            raise LayoutError(
                f"tensor {name!r} has shape {shape}; at most {MAX_DIMENSIONS} dimensions, "
                "none negative"
            )
        if name in buffer_names:
            kept_buffers.append(name)
        elif matches(name, patterns):
            excluded.append(name)
        else:
            size = 1
            for dimension in shape:
                size *= dimension
            entries.append(Entry(name, shape, offset, size))
            offset += size
    if offset > MAX_PARAMETERS:
        raise LayoutError(f"{offset} parameters; at most {MAX_PARAMETERS} are allowed")
    return Layout(tuple(entries), tuple(excluded), tuple(kept_buffers))


def bad_name(name: str) -> str:
    """Say what is wrong with a tensor name, or nothing."""
    try:
        length = len(name.encode())
    except UnicodeEncodeError:
        return "is no text"
    if not 1 <= length <= MAX_NAME_BYTES:
        return f"has {length} bytes, 1 to {MAX_NAME_BYTES} are allowed"
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in name):
        return "has control characters"
    # Tools that keep one file a tensor must not be led out of their folder.
    parts = name.replace("\\", "/").split("/")
    if len(parts) > 1 and (parts[0] == "" or ".." in parts):
        return "is a path out of its folder"
    return ""


def fingerprint(layout: Layout, vector: FloatVector) -> str:
    """SHA-256 (hex) of a model's parameters, the name of a base or a version.

    Hashes, tensor by tensor in layout order, the name, the shape and the values as
    little-endian float32. A bfloat16 or float16 checkpoint has the fingerprint of its
    exact float32 copy; -0.0 and 0.0 differ.
    """
    digest = FingerprintStream(layout)
    digest.update(vector)
    return digest.hexdigest()


class FingerprintStream:
    """`fingerprint` over a vector that arrives in pieces, in order."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._digest = hashlib.sha256(b"dare-agg parameters 1\0")
        self._position = 0

    def update(self, piece: FloatVector) -> None:
        """Take the next ``piece`` of the vector; `LayoutError` where the layout ends before it."""
        start, stop = self._position, self._position + piece.size
        if stop > self._layout.size:
            raise LayoutError(f"{stop} values; this layout has {self._layout.size} parameters")
        little = np.ascontiguousarray(piece, dtype="<f4")
        if stop == start:
            return
        for entry, lo, hi in self._layout.pieces(start, stop):
            if lo == 0:
                self._digest.update(_canonical_header(entry))
            at = entry.offset - start
            self._digest.update(little[at + lo : at + hi].data)
        self._position = stop

    def hexdigest(self) -> str:
        """The fingerprint (64 hex digits); `LayoutError` unless the whole vector was seen."""
        if self._position != self._layout.size:
            raise LayoutError(
                f"{self._position} values seen; this layout has {self._layout.size} parameters"
            )
        return self._digest.hexdigest()


def _canonical_header(entry: Entry) -> bytes:
    name = entry.name.encode()
    return (
        struct.pack("<I", len(name))
        + name
        + struct.pack("<I", len(entry.shape))
        + struct.pack(f"<{len(entry.shape)}Q", *entry.shape)
    )


def check_finite(layout: Layout, vector: _Sliced, what: str, first: int = 0) -> None:
    """Raise `NonFiniteError` naming the first tensor and index that is NaN or infinite.

    ``vector`` may be a part, from element ``first`` on.
    """
    block = 1 << 16
    for start in range(0, vector.size, block):
        piece = vector[start : start + block]
        finite = np.isfinite(piece)
        if not finite.all():
            at = int(np.argmin(finite))
            position = first + start + at
            for entry, lo, _ in layout.pieces(position, position + 1):
                index = tuple(int(i) for i in np.unravel_index(lo, entry.shape or (1,)))
                raise NonFiniteError(
                    f"{what}: {piece[at]} in tensor {entry.name!r} at index {index}; "
                    "only finite values can be merged: check the training step (learning rate, "
                    "overflow)"
                )
            raise NonFiniteError(f"{what}: {piece[at]} at position {position}")

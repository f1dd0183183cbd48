"""A checked update as a source of tiles: its survivors, decoded where they are read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dare_agg.codec.buffers import borrowed
from dare_agg.codec.kept_groups import DECODED
from dare_agg.codec.kernels import compiled, plain_float32
from dare_agg.codec.mask import Mask
from dare_agg.codec.payload import decode_values, payload_bytes
from dare_agg.codec.rotation import GROUP
from dare_agg.codec.update_spec import UpdateSpec
from dare_agg.errors import UpdateError
from dare_agg.files.pages import Pages
from dare_agg.vectors.layout import FloatVector


@dataclass(frozen=True)
class Update:
    """A checked update; a `DeltaSource` of its (rescaled) sparse delta."""

    spec: UpdateSpec
    mask: Mask
    payload: NDArray[np.uint8] = field(repr=False)
    nbytes: int
    survivors: int
    # Of the payload, where it is mapped.
    pages: Pages | None = field(default=None, repr=False, compare=False)
    # Stands for this update among `DecodedGroups`.
    _token: object = field(
        default_factory=object, init=False, repr=False, compare=False, hash=False
    )

    @property
    def size(self) -> int:
        return self.spec.size

    def values(self, first: int, last: int) -> FloatVector:
        """Return the decoded, unscaled survivors number ``first`` to ``last``."""
        parts: list[FloatVector] = []
        while first < last:
            group = first // GROUP
            end = min((group + 1) * GROUP, self.survivors)
            stop = min(last, end)
            parts.append(self._group(group)[first - group * GROUP : stop - group * GROUP])
            if stop == end:
                DECODED.let_go(self._token, group)
            first = stop
        if not parts:
            return np.empty(0, np.float32)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _group(self, group: int) -> FloatVector:
        kept = DECODED.find(self._token, group)
        if kept is not None:
            return kept
        values = decode_values(
            self.spec.values, self.payload, self.survivors, self.spec.values_key, group
        )
        self.spec.scale(values, group * GROUP, down=False)
        DECODED.keep(self._token, group, values)
        if self.pages is not None:
            self.pages.passed(payload_bytes(self.spec.values, GROUP))
        return values

    def sparse(self, lo: int, hi: int) -> Iterator[tuple[NDArray[np.int64], FloatVector]]:
        """Yield ``(positions, rescaled values)`` of the survivors in ``[lo, hi)``, in order.

        The arrays may be reused by the next step: do not keep them.
        """
        for positions, values, scale in self._unscaled(lo, hi):
            if not self.spec.rescale:
                yield positions, values
                continue
            with borrowed(values.size) as rescaled:
                np.multiply(values, scale, out=rescaled)
                yield positions, rescaled

    def _unscaled(
        self, lo: int, hi: int
    ) -> Iterator[tuple[NDArray[np.int64], FloatVector, FloatVector | np.float32]]:
        if self.mask.survivors != self.survivors:
            raise UpdateError(
                f"update of {self.survivors} survivors; its mask has {self.mask.survivors}",
                reason="shape",
            )
        for first, positions, scale in self.mask.within(lo, hi):
            yield positions, self.values(first, first + positions.size), scale

    def read(self, lo: int, hi: int, out: FloatVector) -> None:
        """Overwrite ``out`` with the delta's elements ``lo`` to ``hi``."""
        out[:] = 0
        for positions, values in self.sparse(lo, hi):
            loops = compiled()
            if loops is not None and plain_float32(out):
                loops.put_at(positions, lo, values, out)
                continue
            positions -= lo
            out[positions] = values

    def add(self, lo: int, hi: int, out: FloatVector, weight: float = 1.0) -> None:
        """Add ``weight`` times the delta's elements ``lo`` to ``hi`` to ``out``."""
        factor = np.float32(weight)
        loops = compiled()
        if loops is not None and plain_float32(out):
            for positions, values, scale in self._unscaled(lo, hi):
                if not self.spec.rescale:
                    loops.add_at(positions, lo, values, np.float32(1), factor, out)
                elif isinstance(scale, np.ndarray):
                    loops.add_at(positions, lo, values * scale, np.float32(1), factor, out)
                else:
                    loops.add_at(positions, lo, values, scale, factor, out)
            return
        for positions, values in self.sparse(lo, hi):
            positions -= lo
            with borrowed(values.size) as sums, borrowed(values.size) as weighted:
                out.take(positions, out=sums, mode="clip")
                np.multiply(values, factor, out=weighted)
                sums += weighted
                # Positions are unique, so plain indexing puts each once.
                out[positions] = sums

    def present(self, lo: int, hi: int) -> NDArray[np.bool_]:
        """Which elements ``lo`` to ``hi`` survived."""
        kept = np.zeros(hi - lo, np.bool_)
        kept[self.mask.indices(lo, hi) - lo] = True
        return kept

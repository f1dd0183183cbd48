"""What a party adds to a secure sum of deltas so that they merge by their own Gram matrices.

WUDI (`dare_agg.merge.wudi`) needs Σ Gᵢ and Σ τᵢ·Gᵢ of each Linear's deltas τᵢ, (out, in): sums,
but of in² and out·in words. A party keeps of its Gᵢ the k leading directions, of trace 1 (it
divides by its own norm, which nobody sees), and all multiply by the same public random signs S,
(in, width):

    Gᵢ·S, (in, width)    and    τᵢ·Gᵢ·S, (out, width).

n parties' Gram matrices have no more than n·k directions together, so where ``width`` is some more
the sums give back Σ Gᵢ and Σ τᵢ·Gᵢ whole (`dare_agg.secure.solved`). Where a Linear has
fewer inputs than that, S is the identity.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dare_agg.codec.derive import Keystream, derive_key
from dare_agg.errors import ConfigError
from dare_agg.merge.by_tensor import Matrix, read_matrix
from dare_agg.merge.directions import check_rank, leading_directions
from dare_agg.merge.linears import Linear, model_linears
from dare_agg.vectors.layout import FloatVector, Layout
from dare_agg.vectors.one_thread import one_blas_thread
from dare_agg.vectors.sources import array_source

# Columns beyond the directions of all parties: the error of the fixed point falls with them.
_BEYOND = 8
# Of Gᵢ·S·√in an element is of the size of 1 at most where a direction is one input alone, and 2 or
# more where it is a few: it counts in units of the clip over this.
_ROOM = 2.0


@dataclass(frozen=True)
class Sketched:
    """A Linear and how many columns its sketch has."""

    linear: Linear
    width: int

    @property
    def words(self) -> int:
        """Values a party adds for it."""
        outputs, inputs = self.linear.shape
        return (outputs + inputs) * self.width


@dataclass(frozen=True)
class SketchPlan:
    """The sketches of one sum: over which layout, how many directions a party, how many parties.

    ``clip`` is the sum's, and gives the Gram matrices their unit; ``seed`` its session, from which
    the signs are drawn.
    """

    layout: Layout
    directions: int
    parties: int
    clip: float
    seed: bytes

    def parts(self) -> Iterator[tuple[Sketched, slice, slice]]:
        """Each Linear, and where its Gram part and its values lie in a sketch."""
        at = 0
        for found in sketched(self.layout, self.directions, self.parties):
            inputs = found.linear.shape[1]
            grams = slice(at, at + inputs * found.width)
            at += found.words
            yield found, grams, slice(grams.stop, at)

    def signs(self, found: Sketched) -> Matrix:
        """S of a Linear: columns of length 1."""
        inputs = found.linear.shape[1]
        if found.width == inputs:
            return np.eye(inputs)
        key = derive_key(self.seed, "secure sketch", found.linear.entry.name.encode())
        count = inputs * found.width
        bits = np.unpackbits(Keystream(key).read(0, -(-count // 8)))[:count]
        return (2.0 * bits - 1).reshape(inputs, found.width) / np.sqrt(inputs)

    def unit(self, found: Sketched) -> float:
        """What an element of a Gram part is multiplied by."""
        return self.clip * float(np.sqrt(found.linear.shape[1])) / _ROOM


def sketched(layout: Layout, directions: int, parties: int) -> tuple[Sketched, ...]:
    """The Linears of a model with the columns of their sketches.

    Raises `ConfigError` for a number of directions that is out of bounds, and a model without.
    """
    check_rank(directions)
    linears = model_linears(layout)
    if not linears:
        raise ConfigError(
            "secure = 'wudi': the model has no Linear (a weight of two dimensions), so there is no "
            "Gram matrix to merge by; set secure = 'ties' or 'mean'"
        )
    wanted = parties * directions
    width = wanted + max(_BEYOND, wanted // 4)
    return tuple(Sketched(one, min(width, one.shape[1])) for one in linears.values())


def sketch_words(layout: Layout, directions: int, parties: int) -> int:
    """Values that a party of ``parties`` adds beside its survivors."""
    return sum(found.words for found in sketched(layout, directions, parties))


def sketch_of(plan: SketchPlan, delta: FloatVector) -> FloatVector:
    """A party's part: Gᵢ·S in `SketchPlan.unit` and τᵢ·Gᵢ·S, of each Linear.

    It is 0 where a Linear did not change. ``delta`` is whole: what a drop rate leaves of it is no
    matter here. Raises `MergeError` for values that are not finite.
    """
    source = array_source(delta)
    pieces: list[NDArray[np.float32]] = []
    for found, _, _ in plan.parts():
        linear = found.linear
        inputs = linear.shape[1]
        matrix = read_matrix(source, linear.entry, 0, linear.transposed)
        with one_blas_thread():
            rows = leading_directions(matrix, plan.directions)
            norm = float(np.sqrt(np.square(rows).sum()))
            gram = np.zeros((inputs, found.width))
            if norm > 0:
                rows /= norm
                gram = rows.T @ (rows @ plan.signs(found))
            pieces.append((gram * plan.unit(found)).astype(np.float32).reshape(-1))
            pieces.append((matrix @ gram).astype(np.float32).reshape(-1))
    return np.concatenate(pieces)

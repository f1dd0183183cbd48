"""Which tensors of the base an adapter's names mean.

An adapter names modules as they are in memory, in the class it was trained with: under another
prefix than on disk (``bert.``), or, where transformers keeps key mappings, otherwise altogether.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from dare_agg.checkpoint.names import multimodal_name
from dare_agg.errors import CheckpointError

# Names looked at for a prefix, and prefixes named in an error.
_ANCHORS, _NAMED = 8, 3


@dataclass(frozen=True)
class Piece:
    """Where values of a parameter lie in the base: rows ``lo`` to ``hi`` of it (of its matrix
    ``group`` where several are stacked) are the rows from ``at`` on of ``tensor``.

    Without ``hi`` the parameter is the tensor.
    """

    tensor: str
    group: int = 0
    lo: int = 0
    hi: int | None = None
    at: int = 0


Pieces = tuple[Piece, ...]
Find = Callable[[str], Pieces]


def find_names(
    wanted: Sequence[Sequence[str]],
    base: Mapping[str, object],
    in_memory: Callable[[], Mapping[str, Pieces]],
) -> Find:
    """Return the function that gives the pieces of a parameter in the base; none for no place.

    ``wanted`` holds for each module the names its parameter may have. As they are, under one
    common prefix less or more, and as ``in_memory`` says: the first that finds all of them, or
    the best. Raises `CheckpointError` where two prefixes find equally many.
    """
    rules = [(0, "", "")] + [(1, *way) for way in sorted(_prefixes(wanted, base))]
    scored = [(_found(wanted, base, strip, add), order, strip, add) for order, strip, add in rules]
    most = max(count for count, *_ in scored)
    best = [row for row in scored if row[0] == most]
    best = [row for row in best if row[1] == 0] or best
    if most < len(wanted) or len(best) > 1:
        find = partial(_spelled_alike, *_by_spelling(in_memory()))
        if sum(any(find(name) for name in each) for each in wanted) >= max(most, 1):
            return find
    if len(best) > 1:
        where = ", ".join(repr(_where(row[2], row[3])) for row in best[:_NAMED])
        raise CheckpointError(
            f"{wanted[0][0]!r} may be any of several tensors of the base ({where}); rename the "
            "adapter's tensors after the base's, or merge it with peft first"
        )
    return partial(_under, base, best[0][2], best[0][3])


def _by_spelling(names: Mapping[str, Pieces]) -> tuple[Mapping[str, Pieces], dict[str, Pieces]]:
    """The names in memory, and the same in one spelling where that parts them as well."""
    alike = {multimodal_name(name): pieces for name, pieces in names.items()}
    return names, alike if len(alike) == len(names) else {}


def _spelled_alike(names: Mapping[str, Pieces], alike: Mapping[str, Pieces], name: str) -> Pieces:
    return names.get(name) or alike.get(multimodal_name(name), ())


def _where(strip: str, add: str) -> str:
    return f"{add}…" if add else f"without {strip}"


def _under(base: Mapping[str, object], strip: str, add: str, name: str) -> Pieces:
    for known in (_renamed(name, strip, add), name):
        if known in base:
            return (Piece(known),)
    return ()


def _renamed(name: str, strip: str, add: str) -> str:
    return add + name.removeprefix(strip)


def _found(
    wanted: Sequence[Sequence[str]], base: Mapping[str, object], strip: str, add: str
) -> int:
    return sum(any(_renamed(name, strip, add) in base for name in names) for names in wanted)


def _prefixes(wanted: Sequence[Sequence[str]], base: Mapping[str, object]) -> set[tuple[str, str]]:
    """The prefixes by which one of the first names is found."""
    found: set[tuple[str, str]] = set()
    for names in wanted[:_ANCHORS]:
        for name in names:
            ends = [i + 1 for i, letter in enumerate(name) if letter == "."]
            found |= {(name[:end], "") for end in ends if name[end:] in base}
            found |= {("", other[: -len(name)]) for other in base if other.endswith("." + name)}
        if found:
            break
    return found

"""Names under one common prefix, such as the ``bert.`` that task models put before the base's."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TypeVar

T = TypeVar("T")


def common_prefix(given: Collection[str], wanted: Collection[str]) -> tuple[str, str]:
    """Return (what to strip from, what to put before) the names of ``given``, one of them "".

    Of all prefixes that end in a dot it is the one that gives most of ``wanted``, and none
    where no prefix gives more than the names as they are; of equally good ones the first by
    name. Names without the prefix to strip stay as they are.
    """
    names, goal = set(given), set(wanted)
    found = {(prefix, "") for prefix in _before(names, goal)}
    found |= {("", prefix) for prefix in _before(goal, names)}
    return max(
        [("", ""), *sorted(found)],
        key=lambda way: len(goal & {_changed(name, *way) for name in names}),
    )


def renamed(given: Mapping[str, T], wanted: Collection[str]) -> dict[str, T]:
    """Return ``given`` under the names of `common_prefix`.

    It stays as it is where two of its names would become one.
    """
    way = common_prefix(given, wanted)
    changed = {_changed(name, *way): value for name, value in given.items()}
    return changed if len(changed) == len(given) else dict(given)


def _changed(name: str, strip: str, add: str) -> str:
    return add + name.removeprefix(strip)


def _before(long: set[str], short: set[str]) -> set[str]:
    """What stands before names of ``short`` in names of ``long``, its dot included."""
    return {
        name[: at + 1]
        for name in long
        for at, letter in enumerate(name)
        if letter == "." and name[at + 1 :] in short
    }

"""Who takes part in a slice: where its models lie, which is the base, how many there may be.

A ``base_model`` that is not among listed models is added to them; a method that knows no base
counts it as one more. In slices the base stands among the sources.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from dare_agg.offline.mergekit.document import Document, Slice, Source
from dare_agg.offline.mergekit.names import place
from dare_agg.offline.mergekit.words import Word, at_line


@dataclass(frozen=True)
class Member:
    """A model of a slice where it lies, with what the file says of it."""

    place: str
    adapter: str | None
    source: Source

    @cached_property
    def key(self) -> tuple[str, str]:
        """What two names of one model have in common."""
        return os.path.realpath(self.place), os.path.realpath(self.adapter) if self.adapter else ""


@dataclass(frozen=True)
class Cast:
    """The members of one slice: a base, unless the method knows none, and the rest."""

    base: Member | None
    others: tuple[Member, ...]
    part: Slice

    @property
    def members(self) -> tuple[Member, ...]:
        """All of them, the base first."""
        return (*filter(None, [self.base]), *self.others)


def cast_of(document: Document, word: Word, part: Slice, folder: Path) -> Cast:
    """Find a slice's models and its base.

    Raises `ConfigError` for a model that is named twice or missing, and for too few or too many.
    """
    members = [member_of(source, folder) for source in part.sources]
    named = part.base or document.base
    base = None if named is None else member_of(Source(named, named.line), folder)
    seen: dict[tuple[str, str], int] = {}
    for member in members:
        if member.key in seen:
            raise at_line(
                member.source.line,
                f"{member.source.model} is named on line {seen[member.key]} already; give it once, "
                "with the sum of the weights",
            )
        seen[member.key] = member.source.line
    if base is not None:
        among = [member for member in members if member.key == base.key]
        if among:
            base = among[0]
        elif document.models:
            members.append(base)
        elif word.base != "counts":
            raise at_line(part.line, f"base_model {named} is not among the sources of this slice")
    if word.base == "needed" and base is None:
        raise at_line(document.method.line, f"{document.method.value} needs a base_model")
    if word.base == "counts":
        base = None
    others = tuple(member for member in members if base is None or member.key != base.key)
    low, high = word.models
    if not low <= len(others) <= high:
        needed = f"{low}" if low == high else f"at least {low}"
        beside = " beside the base" if base is not None else ""
        raise at_line(
            part.line,
            f"{document.method.value} takes {needed} model{'s' * (low != 1)}{beside}, "
            f"{len(others)} are given",
        )
    return Cast(base, others, part)


def member_of(source: Source, folder: Path) -> Member:
    """Find where a named model lies; relative paths count from the file's folder."""
    model = source.model
    adapter = model.adapter
    return Member(
        place(model.path, model.line, folder),
        None if adapter is None else place(adapter, model.line, folder),
        source,
    )


def idle_settings(document: Document, word: Word, casts: Sequence[Cast]) -> list[str]:
    """Settings that play no part in a method, which mergekit passes over in silence."""
    method = document.method.value
    notes = []
    scopes = [*document.settings, *(cast.part.settings for cast in casts)]
    for settings in scopes:
        for key, one in settings.items():
            if key not in (*word.shared, *word.own):
                notes.append(f"line {one.line}: {key} plays no part in {method}: passed over")
    for cast in casts:
        for member in cast.members:
            for key, one in member.source.settings.items():
                if member is cast.base:
                    why = "is of the base, which has none"
                elif key in word.shared:
                    why = "of a model is not read, it is one for the merge"
                elif key not in word.own:
                    why = f"plays no part in {method}"
                else:
                    continue
                notes.append(f"line {one.line}: {key} {why}: passed over")
    return notes

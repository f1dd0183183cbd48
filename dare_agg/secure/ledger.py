"""What a party has already put into a sum, so that it never enters a second one.

A server that could sum the same data with two cohorts would subtract the two sums and see
whoever was left out. A claim is made before the masked vector leaves. It names the delta by
its SHA-256 and the round by run and number; of a model merged in one shot it names each tuned
tensor too, so that the same model is known again under another base, another set of tensors
or another run. What was trained from one version of the base enters no second sum over
another cohort, however its bits differ, and where this party has signed who is alive, none
over another set of the living: two such sums would differ by single parties' data.

A claim is not taken back when the round fails: others may have unmasked the sum that this
party does not know of. Whoever is sure that nobody did lets a party forget it
(`FileLedger.forget`).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from dare_agg.errors import ProtocolError, StateError
from dare_agg.secure.encoding import identifiers
from dare_agg.secure.terms import NO_TRAINING, SecureTerms
from dare_agg.vectors.layout import FloatVector


class Ledger(Protocol):
    """What a party put into secure sums: it never enters two that differ by a few parties."""

    def claim(self, terms: SecureTerms, delta: FloatVector, tensors: Sequence[bytes] = ()) -> None:
        """Note the delta, the round and the ``tensors`` (`tensor_claim`).

        Raises `ProtocolError` (reason "second-cohort") where one is there already, or a sum of
        what was trained from the same base with another cohort.
        """

    def sign(self, terms: SecureTerms, alive: Sequence[int]) -> None:
        """Note who is alive in a sum before this party signs it.

        Raises `ProtocolError` (reason "second-cohort") where it has signed another set for
        what was trained from the same base.
        """


def tensor_claim(values: FloatVector) -> bytes:
    """What names a tuned tensor, whatever base it is taken from: SHA-256 of its float32."""
    return _digest(b"dare-agg tensor 1\0", values)


def _digest(head: bytes, values: FloatVector) -> bytes:
    digest = hashlib.sha256(head)
    digest.update(np.ascontiguousarray(values, "<f4").data)
    return digest.digest()


def _claims(
    terms: SecureTerms, delta: FloatVector, tensors: Iterable[bytes]
) -> dict[str, tuple[str, ...]]:
    place = hashlib.sha256(
        b"dare-agg place 1\0"
        + terms.roster
        + terms.round.to_bytes(4, "little")
        + terms.run.encode()
    )
    return {
        "delta": (_digest(b"dare-agg delta 1\0", delta).hex(),),
        "round": (place.hexdigest(),),
        "tensors": tuple(claim.hex() for claim in tensors),
    }


def _check(claims: dict[str, tuple[str, ...]], base: Base | None, book: _Book) -> None:
    for what, names in claims.items():
        if not book.claims.isdisjoint(names):
            thing = "model" if what == "tensors" else what
            raise _second(f"this {thing} has already gone into a secure sum")
    if base is not None and not book.cohorts.get(base.name, {base.cohort}) <= {base.cohort}:
        raise _second(
            "what was trained from this version of the base has gone into a sum over another cohort"
        )


def _check_alive(base: Base, alive: str, book: _Book) -> None:
    if not book.signed.get(base.name, {alive}) <= {alive}:
        raise _second(
            "this party has signed a sum of what was trained from this version of the base over "
            "other parties"
        )


def _second(why: str) -> ProtocolError:
    return ProtocolError(
        f"{why}; a second sum would differ from the first by single parties' data: refused "
        "(dare-agg keys ledger shows it)",
        reason="second-cohort",
    )


@dataclass(frozen=True)
class Base:
    """The version that a training started from, and among whom it is summed."""

    name: str
    cohort: str


def _base(terms: SecureTerms) -> Base | None:
    """None for a merge of models that parties had: their tensors are claimed instead."""
    if terms.training == NO_TRAINING:
        return None
    return Base(f"{terms.base} {terms.layout}", _parties(terms.cohort))


def _parties(ids: Sequence[int]) -> str:
    return hashlib.sha256(b"dare-agg parties 1\0" + identifiers(sorted(ids))).hexdigest()


@dataclass
class _Book:
    """What a ledger says: claims, and by base the cohorts summed over and the sets signed."""

    claims: set[str] = field(default_factory=set, repr=False)
    cohorts: dict[str, set[str]] = field(default_factory=dict, repr=False)
    signed: dict[str, set[str]] = field(default_factory=dict, repr=False)


@dataclass
class MemoryLedger:
    """A ledger for one process."""

    _book: _Book = field(default_factory=_Book, repr=False)

    def claim(self, terms: SecureTerms, delta: FloatVector, tensors: Sequence[bytes] = ()) -> None:
        claims, base = _claims(terms, delta, tensors), _base(terms)
        _check(claims, base, self._book)
        for names in claims.values():
            self._book.claims.update(names)
        if base is not None:
            self._book.cohorts.setdefault(base.name, set()).add(base.cohort)

    def sign(self, terms: SecureTerms, alive: Sequence[int]) -> None:
        base = _base(terms)
        if base is not None:
            _check_alive(base, _parties(alive), self._book)
            self._book.signed.setdefault(base.name, set()).add(_parties(alive))


@dataclass(frozen=True)
class Entry:
    """One contribution of a `FileLedger`: what a person needs to know it again."""

    session: str
    run: str
    number: int
    time: str
    claims: tuple[str, ...] = field(repr=False)
    base: str = field(default="", repr=False)
    cohort: str = field(default="", repr=False)


@dataclass
class FileLedger:
    """A ledger of JSON lines, one a contribution, on disk before the vector leaves."""

    path: Path

    def claim(self, terms: SecureTerms, delta: FloatVector, tensors: Sequence[bytes] = ()) -> None:
        claims, base = _claims(terms, delta, tensors), _base(terms)
        with self._open(os.O_RDWR | os.O_CREAT | os.O_APPEND) as file:
            text = file.read()
            _check(claims, base, _read_book(text))
            record: dict[str, object] = {
                **{what: list(names) for what, names in claims.items()},
                "run": terms.run,
                "number": terms.round,
            }
            if base is not None:
                record |= {"base": base.name, "cohort": base.cohort}
            self._append(file, text, terms, record)

    def sign(self, terms: SecureTerms, alive: Sequence[int]) -> None:
        base = _base(terms)
        if base is None:
            return
        with self._open(os.O_RDWR | os.O_CREAT | os.O_APPEND) as file:
            text = file.read()
            _check_alive(base, _parties(alive), _read_book(text))
            self._append(file, text, terms, {"base": base.name, "signed": _parties(alive)})

    def _append(
        self, file: BinaryIO, text: bytes, terms: SecureTerms, record: dict[str, object]
    ) -> None:
        record["session"] = terms.session.hex()
        record["time"] = datetime.now(UTC).isoformat(timespec="seconds")
        # A line that was cut off by a crash stays alone.
        start = b"" if not text or text.endswith(b"\n") else b"\n"
        file.write(start + json.dumps(record).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
        if not text:
            _keep_name(self.path)

    def entries(self) -> list[Entry]:
        """All contributions, oldest first. Raises `StateError` where there is no ledger."""
        with self._open(os.O_RDWR) as file:
            return _read(file.read())

    def forget(self, session: str) -> int:
        """Drop the claims of the sessions whose hex name begins with ``session``: their data may
        enter another sum. Returns how many; nothing changes where it is not one."""
        with self._open(os.O_RDWR) as file:
            at, places, found = 0, [], set()
            for line in file.read().splitlines(keepends=True):
                for record in _records(line):
                    if str(record["session"]).startswith(session):
                        places.append((at, len(line) - 1))
                        found.add(record["session"])
                at += len(line)
            if len(found) == 1:
                # Blanked where they stand, so that no crash harms another line.
                for place, length in places:
                    file.seek(place)
                    file.write(b" " * length)
                file.flush()
                os.fsync(file.fileno())
        return len(found)

    @contextmanager
    def _open(self, flags: int) -> Iterator[BinaryIO]:
        try:
            if flags & os.O_CREAT:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            with os.fdopen(os.open(self.path, flags, 0o600), "r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield file
        except OSError as error:
            raise StateError(
                f"ledger {self.path}: {error.strerror}; nothing was contributed: give the "
                "path of a file that can be written"
            ) from error


def _keep_name(path: Path) -> None:
    """Have the folder's entry of a new file on disk."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _records(text: bytes) -> Iterator[dict[str, Any]]:
    """The lines that are whole."""
    for line in text.splitlines():
        try:
            record = json.loads(line)
            if isinstance(record["session"], str):
                yield record
        except (ValueError, KeyError, TypeError):
            continue


def _read(text: bytes) -> list[Entry]:
    """The contributions; a line that says who was alive is none."""
    return [
        Entry(
            record["session"],
            str(record["run"]),
            int(record["number"]),
            str(record["time"]),
            tuple(str(name) for what in ("delta", "round", "tensors") for name in record[what]),
            str(record.get("base", "")),
            str(record.get("cohort", "")),
        )
        for record in _records(text)
        if "delta" in record
    ]


def _read_book(text: bytes) -> _Book:
    book = _Book()
    for entry in _read(text):
        book.claims.update(entry.claims)
        if entry.base:
            book.cohorts.setdefault(entry.base, set()).add(entry.cohort)
    for record in _records(text):
        if "signed" in record:
            book.signed.setdefault(str(record["base"]), set()).add(str(record["signed"]))
    return book

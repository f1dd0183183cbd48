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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from dare_agg.errors import ProtocolError, StateError
from dare_agg.files.atomic import sync_folder
from dare_agg.files.json_text import parse_json
from dare_agg.files.trust import open_own, own_folder
from dare_agg.secure.encoding import identifiers
from dare_agg.secure.terms import NO_TRAINING, SecureTerms
from dare_agg.vectors.layout import FloatVector

_REMEDY = "name a file in a folder of this user's own (secure-ledger in the node config)"
_CLAIMS = ("delta", "round", "tensors")
_ALWAYS = {"session", "time"}
# The fields of a line: models that parties had, what was trained, and who was alive in a sum.
_MODELS = _ALWAYS | {*_CLAIMS, "run", "number"}
_TRAINED = _MODELS | {"base", "cohort"}
_SIGNED = _ALWAYS | {"base", "signed"}


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
    """A ledger of JSON lines, one a contribution, on disk before the vector leaves.

    Every method raises `StateError` where the file cannot be read or written, another user
    could have swapped it, or one of its lines is damaged.
    """

    path: Path

    def claim(self, terms: SecureTerms, delta: FloatVector, tensors: Sequence[bytes] = ()) -> None:
        claims, base = _claims(terms, delta, tensors), _base(terms)
        with self._open(os.O_RDWR | os.O_CREAT) as file:
            text = self._whole(file.read())
            _check(claims, base, _book(self._lines(text)))
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
        with self._open(os.O_RDWR | os.O_CREAT) as file:
            text = self._whole(file.read())
            _check_alive(base, _parties(alive), _book(self._lines(text)))
            self._append(file, text, terms, {"base": base.name, "signed": _parties(alive)})

    def _append(
        self, file: BinaryIO, text: bytes, terms: SecureTerms, record: dict[str, object]
    ) -> None:
        record["session"] = terms.session.hex()
        record["time"] = datetime.now(UTC).isoformat(timespec="seconds")
        # In place of a line that a crash cut off.
        file.seek(len(text))
        file.truncate()
        start = b"" if not text or text.endswith(b"\n") else b"\n"
        file.write(start + json.dumps(record).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
        if not text:
            sync_folder(self.path.parent)

    def entries(self) -> list[Entry]:
        """All contributions, oldest first. Raises `StateError` where there is no ledger."""
        with self._open(os.O_RDWR) as file:
            return _entries(self._lines(self._whole(file.read())))

    def forget(self, session: str) -> int:
        """Drop the claims of the sessions whose hex name begins with ``session``: their data may
        enter another sum. Returns how many; nothing changes where it is not one."""
        with self._open(os.O_RDWR) as file:
            lines = [
                line
                for line in self._lines(self._whole(file.read()))
                if line.record["session"].startswith(session)
            ]
            found = {line.record["session"] for line in lines}
            if len(found) == 1:
                # Blanked where they stand, so that no crash harms another line.
                for line in lines:
                    file.seek(line.at)
                    file.write(b" " * line.length)
                file.flush()
                os.fsync(file.fileno())
        return len(found)

    @contextmanager
    def _open(self, flags: int) -> Iterator[BinaryIO]:
        try:
            if flags & os.O_CREAT:
                own_folder(self.path.parent, remedy=_REMEDY)
            with os.fdopen(open_own(self.path, flags, remedy=_REMEDY), "r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield file
        except OSError as error:
            raise StateError(
                f"ledger {self.path}: {error.strerror}; nothing was contributed: {_REMEDY}"
            ) from error

    def _whole(self, text: bytes) -> bytes:
        """The text without a last line that a crash cut off.

        A vector, or a signature, leaves only after all of its line is on the disk (`_append`
        flushes first). So of a last line that is but the beginning of one nothing has left:
        it is passed over, and the next line is written in its place. Whoever could cut a line
        short could remove it as well, so nothing is lost by this. What else a line may look
        like, a disk that rots or a person has made: garbled, zeros, whole but of other
        fields. That is refused (`_lines`). A last line that lacks its newline alone counts.
        """
        last = text[text.rfind(b"\n") + 1 :]
        beginning = any(last.startswith(b[: len(last)]) for b in (b'{"delta": ["', b'{"base": "'))
        ended = b'"}' in last or last.rstrip().endswith(b"}")
        return (
            text[: len(text) - len(last)] if beginning and not ended and b"\0" not in last else text
        )

    def _lines(self, text: bytes) -> list[_Line]:
        """All lines but those that were forgotten. Raises `StateError` for one that cannot be
        read: it may name what has gone into a sum."""
        found, at = [], 0
        for number, line in enumerate(text.split(b"\n"), 1):
            if line.strip(b" "):
                try:
                    found.append(_Line(at, len(line), _record(line)))
                except (ValueError, KeyError, TypeError) as error:
                    raise StateError(
                        f"ledger {self.path}: line {number} cannot be read ({error}), so what it "
                        "keeps from a second sum is unknown: nothing is contributed; mend the "
                        "line, or remove it once it is sure that its sum was never unmasked"
                    ) from error
            at += len(line) + 1
        return found


@dataclass(frozen=True)
class _Line:
    """A line of a ledger and its place in the file (bytes)."""

    at: int
    length: int
    record: Mapping[str, Any] = field(repr=False)


def _record(line: bytes) -> dict[str, Any]:
    """Read one line strictly; raises `ValueError`, `KeyError` or `TypeError`."""
    record = parse_json(line, unique=True)
    if not isinstance(record, dict) or record.keys() not in (_MODELS, _TRAINED, _SIGNED):
        raise ValueError("not the fields of a ledger's line")
    digests = [record["session"]]
    for what in _CLAIMS if "delta" in record else ():
        if not isinstance(record[what], list):
            raise ValueError(f"{what} is no list")
        digests += record[what]
    digests += [record[what] for what in ("cohort", "signed") if what in record]
    if any(len(bytes.fromhex(digest)) != 32 for digest in digests):
        raise ValueError("a digest of another length")
    words = [record[what] for what in ("run", "time", "base") if what in record]
    if not all(isinstance(word, str) for word in words) or type(record.get("number", 0)) is not int:
        raise ValueError("a field of another type")
    return record


def _entries(lines: Iterable[_Line]) -> list[Entry]:
    """The contributions; a line that says who was alive is none."""
    return [
        Entry(
            line.record["session"],
            line.record["run"],
            line.record["number"],
            line.record["time"],
            tuple(name for what in _CLAIMS for name in line.record[what]),
            line.record.get("base", ""),
            line.record.get("cohort", ""),
        )
        for line in lines
        if "delta" in line.record
    ]


def _book(lines: Sequence[_Line]) -> _Book:
    book = _Book()
    for entry in _entries(lines):
        book.claims.update(entry.claims)
        if entry.base:
            book.cohorts.setdefault(entry.base, set()).add(entry.cohort)
    for line in lines:
        if "signed" in line.record:
            book.signed.setdefault(line.record["base"], set()).add(line.record["signed"])
    return book

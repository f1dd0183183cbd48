"""What a party has already put into a sum, so that it never enters a second one.

A server that could sum the same data with two cohorts would subtract the two sums and see
whoever was left out. A claim is made before the masked vector leaves. It names the delta by
its SHA-256 and the round by run and number; of a model merged in one shot it names each tuned
tensor too, so that the same model is known again under another base, another set of tensors
or another run. A claim is not taken back when the round fails: others may have unmasked the
sum that this party does not know of. Whoever is sure that nobody did lets a party forget it
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
from typing import BinaryIO, Protocol

import numpy as np

from dare_agg.errors import ProtocolError, StateError
from dare_agg.secure.terms import SecureTerms
from dare_agg.vectors.layout import FloatVector


class Ledger(Protocol):
    """Remembers contributions."""

    def claim(self, terms: SecureTerms, delta: FloatVector, tensors: Sequence[bytes] = ()) -> None:
        """Note the delta, the round and the ``tensors`` (`tensor_claim`).

        Raises `ProtocolError` (reason "second-cohort") where one is there already.
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


def _check(claims: dict[str, tuple[str, ...]], seen: set[str]) -> None:
    for what, names in claims.items():
        if not seen.isdisjoint(names):
            thing = "model" if what == "tensors" else what
            raise ProtocolError(
                f"this {thing} has already gone into a secure sum; a second sum would differ from "
                "the first by single parties' data: refused (dare-agg keys ledger shows it)",
                reason="second-cohort",
            )


@dataclass
class MemoryLedger:
    """A ledger for one process."""

    _seen: set[str] = field(default_factory=set, repr=False)

    def claim(self, terms: SecureTerms, delta: FloatVector, tensors: Sequence[bytes] = ()) -> None:
        claims = _claims(terms, delta, tensors)
        _check(claims, self._seen)
        for names in claims.values():
            self._seen.update(names)


@dataclass(frozen=True)
class Entry:
    """One contribution of a `FileLedger`: what a person needs to know it again."""

    session: str
    run: str
    number: int
    time: str
    claims: tuple[str, ...] = field(repr=False)


@dataclass
class FileLedger:
    """A ledger of JSON lines, one a contribution, on disk before the vector leaves."""

    path: Path

    def claim(self, terms: SecureTerms, delta: FloatVector, tensors: Sequence[bytes] = ()) -> None:
        claims = _claims(terms, delta, tensors)
        with self._open(os.O_RDWR | os.O_CREAT | os.O_APPEND) as file:
            text = file.read()
            _check(claims, {name for entry in _read(text) for name in entry.claims})
            record = {
                **{what: list(names) for what, names in claims.items()},
                "run": terms.run,
                "number": terms.round,
                "session": terms.session.hex(),
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
            }
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
            at, places = 0, []
            for line in file.read().splitlines(keepends=True):
                if any(entry.session.startswith(session) for entry in _read(line)):
                    places.append((at, len(line) - 1))
                at += len(line)
            if len(places) == 1:
                # Blanked where it stands, so that no crash harms another line.
                file.seek(places[0][0])
                file.write(b" " * places[0][1])
                file.flush()
                os.fsync(file.fileno())
        return len(places)

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


def _read(text: bytes) -> list[Entry]:
    found = []
    for line in text.splitlines():
        try:
            record = json.loads(line)
            names = [*record["delta"], *record["round"], *record["tensors"]]
            found.append(
                Entry(
                    str(record["session"]),
                    str(record["run"]),
                    int(record["number"]),
                    str(record["time"]),
                    tuple(str(name) for name in names),
                )
            )
        except (ValueError, KeyError, TypeError):
            continue
    return found

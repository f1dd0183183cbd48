"""What a party has already put into a sum, so that it never enters a second one.

A server that could sum the same delta with two cohorts would subtract the two sums and see
whoever was left out. A claim is made before the masked vector leaves; it names the delta by
its SHA-256 and the round by run and number, and it is never taken back, not even when the
round fails: a party that wants to try again with the same delta removes the line itself.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from dare_agg.errors import ProtocolError, StateError
from dare_agg.layout import FloatVector
from dare_agg.secure.terms import SecureTerms


class Ledger(Protocol):
    """Remembers contributions."""

    def claim(self, terms: SecureTerms, delta: FloatVector) -> None:
        """Note the delta and the round; raises `ProtocolError` (reason "second-cohort")."""


def _claims(terms: SecureTerms, delta: FloatVector) -> tuple[str, str]:
    values = hashlib.sha256(b"dare-agg delta 1\0")
    values.update(np.ascontiguousarray(delta, "<f4").data)
    place = hashlib.sha256(
        b"dare-agg place 1\0"
        + terms.roster
        + terms.round.to_bytes(4, "little")
        + terms.run.encode()
    )
    return values.hexdigest(), place.hexdigest()


def _refuse(what: str) -> ProtocolError:
    return ProtocolError(
        f"this {what} has already gone into a secure sum; a second sum would differ from the "
        "first by single parties' data: refused",
        reason="second-cohort",
    )


@dataclass
class MemoryLedger:
    """A ledger for one process."""

    _seen: set[str] = field(default_factory=set, repr=False)

    def claim(self, terms: SecureTerms, delta: FloatVector) -> None:
        claims = _claims(terms, delta)
        for what, claim in zip(("delta", "round"), claims, strict=True):
            if claim in self._seen:
                raise _refuse(what)
        self._seen.update(claims)


@dataclass
class FileLedger:
    """A ledger of JSON lines, one a contribution, on disk before the vector leaves."""

    path: Path

    def claim(self, terms: SecureTerms, delta: FloatVector) -> None:
        import fcntl

        claims = _claims(terms, delta)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            with os.fdopen(handle, "r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                text = file.read()
                seen = _read(text)
                for what, claim in zip(("delta", "round"), claims, strict=True):
                    if claim in seen:
                        raise _refuse(what)
                record = {
                    "delta": claims[0],
                    "round": claims[1],
                    "run": terms.run,
                    "number": terms.round,
                    "session": terms.session.hex(),
                }
                # A line that was cut off by a crash stays alone.
                start = b"" if not text or text.endswith(b"\n") else b"\n"
                file.write(start + json.dumps(record).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise StateError(
                f"ledger {self.path}: {error.strerror}; nothing was contributed: give a path "
                "that can be written"
            ) from error


def _read(text: bytes) -> set[str]:
    seen: set[str] = set()
    for line in text.splitlines():
        try:
            record = json.loads(line)
            seen.update((str(record["delta"]), str(record["round"])))
        except (ValueError, KeyError, TypeError):
            continue
    return seen

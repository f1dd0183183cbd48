"""The roster: who may take part, signed by the consortium.

A roster lists the parties' public keys under fixed ids. It counts only with a valid
signature of every key that a party has pinned as the consortium's: one key of a coordinator
all trust, or the keys of all members where there is none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from dare_agg.errors import ConfigError, ProtocolError, StateError
from dare_agg.files.atomic import replace_file
from dare_agg.files.json_text import parse_json
from dare_agg.secure.encoding import blob, u32
from dare_agg.secure.identity import (
    KEY_BYTES,
    SIGNATURE_BYTES,
    Identity,
    check_name,
    key_fingerprint,
    verify,
)

MAX_MEMBERS = 10_000
_FORMAT = "dare-agg roster 1"


@dataclass(frozen=True)
class Member:
    """One party: its id (from 1), its name and its Ed25519 public key."""

    id: int
    name: str
    public: bytes


@dataclass(frozen=True)
class Roster:
    """Members of a consortium in the order of their ids, and the signatures over them.

    ``serial`` grows with each new roster of the same name, so an old one can be told.
    """

    name: str
    serial: int
    members: tuple[Member, ...]
    signatures: tuple[tuple[bytes, bytes], ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        check_name(self.name)
        if not 0 <= self.serial < 1 << 32:
            raise ConfigError(f"roster serial {self.serial} is outside [0, 2**32)")
        if not 1 <= len(self.members) <= MAX_MEMBERS:
            raise ConfigError(
                f"a roster of {len(self.members)} members; 1 to {MAX_MEMBERS} are allowed"
            )
        for place, member in enumerate(self.members, 1):
            check_name(member.name)
            if member.id != place or len(member.public) != KEY_BYTES:
                raise ConfigError(f"member {member.name!r} has a bad id or public key")
        for what in ("name", "public"):
            values = [getattr(member, what) for member in self.members]
            if len(set(values)) != len(values):
                raise ConfigError(f"two members of the roster share a {what}; each needs its own")

    @cached_property
    def _by_id(self) -> dict[int, Member]:
        return {member.id: member for member in self.members}

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of name, serial and members; signatures are not part of it."""
        parts = [b"dare-agg roster 1\0", blob(self.name.encode()), u32(self.serial)]
        for member in self.members:
            parts += [u32(member.id), blob(member.name.encode()), member.public]
        return hashlib.sha256(b"".join(parts)).digest()

    def __getitem__(self, party: int) -> Member:
        member = self._by_id.get(party)
        if member is None:
            raise ProtocolError(
                f"party {party} is not in roster {self.name!r} of {len(self.members)} members",
                reason="roster",
            )
        return member

    def id_of(self, public: bytes) -> int:
        """The id of a public key. Raises `ProtocolError` (reason "roster")."""
        for member in self.members:
            if member.public == public:
                return member.id
        raise ProtocolError(
            f"key {key_fingerprint(public)} is not in roster {self.name!r}; ask the consortium "
            "for a new roster",
            reason="roster",
        )


def make_roster(name: str, members: Sequence[tuple[str, bytes]], serial: int = 1) -> Roster:
    """Give ids to ``(name, public key)`` pairs, in the order of their public keys."""
    ordered = sorted(members, key=lambda pair: pair[1])
    return Roster(
        name,
        serial,
        tuple(Member(place, who, key) for place, (who, key) in enumerate(ordered, 1)),
    )


def sign_roster(roster: Roster, signer: Identity) -> Roster:
    """Return the roster with the signer's signature added."""
    kept = [pair for pair in roster.signatures if pair[0] != signer.public]
    kept.append((signer.public, signer.sign(_signed(roster))))
    return replace(roster, signatures=tuple(sorted(kept)))


def check_roster(roster: Roster, trusted: Sequence[bytes]) -> None:
    """Require a valid signature of every trusted key. Raises `ProtocolError`."""
    if not trusted:
        raise ConfigError("no consortium key is pinned; name at least one public key to trust")
    given = dict(roster.signatures)
    for public in trusted:
        if public not in given:
            raise ProtocolError(
                f"roster {roster.name!r} lacks the signature of {key_fingerprint(public)}; "
                "have it signed with dare-agg keys sign",
                reason="roster",
            )
        verify(public, given[public], _signed(roster), f"roster {roster.name!r}")


def _signed(roster: Roster) -> bytes:
    return b"dare-agg roster signature 1\0" + roster.digest


def write_roster(path: Path, roster: Roster) -> None:
    """Write the roster as JSON, replacing the file in one step; raises `StateError`."""
    record = {
        "format": _FORMAT,
        "name": roster.name,
        "serial": roster.serial,
        "members": [{"id": m.id, "name": m.name, "public": m.public.hex()} for m in roster.members],
        "signatures": [
            {"public": public.hex(), "signature": signature.hex()}
            for public, signature in roster.signatures
        ],
    }
    replace_file(path, ((json.dumps(record, indent=1) + "\n").encode(),))


def parse_roster(text: str, what: str = "roster") -> Roster:
    """Read a roster strictly; the signatures are checked by `check_roster`, not here.

    Raises `StateError` for what is no roster.
    """
    try:
        record = parse_json(text)
        if set(record) != {"format", "name", "serial", "members", "signatures"}:
            raise ValueError("another set of fields")
        if record["format"] != _FORMAT:
            raise ValueError(f"format {str(record['format'])[:40]!r}")
        members = tuple(
            Member(_integer(m["id"]), str(m["name"]), bytes.fromhex(m["public"]))
            for m in record["members"]
        )
        signatures = tuple(
            (bytes.fromhex(s["public"]), bytes.fromhex(s["signature"]))
            for s in record["signatures"]
        )
        if any(len(p) != KEY_BYTES or len(s) != SIGNATURE_BYTES for p, s in signatures):
            raise ValueError("a signature of another length")
        return Roster(str(record["name"]), _integer(record["serial"]), members, signatures)
    except (ValueError, KeyError, TypeError, ConfigError) as error:
        raise StateError(
            f"{what} is no roster ({error}); make one with dare-agg keys roster"
        ) from error


def read_roster(path: Path) -> Roster:
    """Read a roster file. Raises `StateError`."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise StateError(f"{path}: {error.strerror}; make one with dare-agg keys roster") from error
    except ValueError as error:
        raise StateError(f"{path} is no roster: {error}") from error
    return parse_roster(text, str(path))


def _integer(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{str(value)[:40]!r} is no whole number")
    return value

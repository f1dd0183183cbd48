"""The ten messages of a secure sum as canonical bytes.

Every message begins with ``"DS"``, the protocol version, its kind and the session. Those of
a party end with its Ed25519 signature over all that precedes. Decoding takes exactly what
encoding makes and checks every length against the terms before anything is stored: no list is
longer than the cohort, whose work and memory it would else multiply.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from itertools import pairwise

from dare_agg.errors import ProtocolError
from dare_agg.secure.encoding import DIGEST_BYTES, Reader, blob, identifiers, u8, u32
from dare_agg.secure.identity import SIGNATURE_BYTES, Identity, verify
from dare_agg.secure.roster import Roster
from dare_agg.secure.shamir import SHARE_BYTES
from dare_agg.secure.terms import PROTOCOL_VERSION, SecureTerms

# Kinds; requests of the server have the high bit.
ADVERT, SHARES, VECTOR, ALIVE, REVEAL = 1, 2, 3, 4, 5
KEYS, DELIVERY, ALIVE_LIST, SIGNATURES = 0x82, 0x83, 0x84, 0x85

_MAGIC = b"DS" + u8(PROTOCOL_VERSION)
KEY_BYTES = NONCE_BYTES = 32
SEALED_BYTES = 2 * SHARE_BYTES + 16
# Header, party, two keys, two commitments, signature.
_ADVERT = struct.Struct(f"<36xI32s32s32s32s{SIGNATURE_BYTES}x")
ADVERT_BYTES = _ADVERT.size


def header(kind: int, session: bytes) -> bytes:
    """First bytes of a message of this kind: magic, version, kind, session (32 bytes)."""
    return _MAGIC + u8(kind) + session


def open_message(data: bytes, kind: int, session: bytes, what: str) -> Reader:
    """Check the header and return a reader behind it.

    Raises `ProtocolError`: another kind or version ("stage"), another session ("session").
    """
    read = Reader(data, what)
    if read.take(3) != _MAGIC or read.u8() != kind:
        raise ProtocolError(
            f"{what}: another kind of message, or of another protocol version", reason="stage"
        )
    if read.take(DIGEST_BYTES) != session:
        raise ProtocolError(
            f"{what} belongs to another session: a replay, or terms that differ", reason="session"
        )
    return read


def signed(identity: Identity, body: bytes) -> bytes:
    """``body`` with the party's signature behind it: a whole message."""
    return body + identity.sign(signing_input(body))


def check_signature(roster: Roster, party: int, message: bytes, what: str) -> None:
    """Check the signature at the end of a party's message."""
    body, signature = message[:-SIGNATURE_BYTES], message[-SIGNATURE_BYTES:]
    verify(roster[party].public, signature, signing_input(body), f"party {party} on its {what}")


def signing_input(body: bytes) -> bytes:
    """The bytes under a party's signature; long messages enter as their SHA-256."""
    return b"dare-agg secure message 1\0" + hashlib.sha256(body).digest()


def _party(read: Reader, terms: SecureTerms) -> int:
    party = read.u32()
    if party not in terms.members:
        raise ProtocolError(
            f"{read.what}: party {party} is not in the cohort of {len(terms.cohort)}",
            reason="cohort",
        )
    return party


@dataclass(frozen=True)
class Advert:
    """A party's ephemeral keys, its commitments, and the very bytes that were signed."""

    party: int
    sealing_key: bytes
    masking_key: bytes
    nonce_commitment: bytes
    self_commitment: bytes
    data: bytes


def encode_advert(
    identity: Identity,
    session: bytes,
    party: int,
    sealing_key: bytes,
    masking_key: bytes,
    nonce_commitment: bytes,
    self_commitment: bytes,
) -> bytes:
    """A party's first message: its ephemeral X25519 keys and its commitments (32 bytes each)."""
    keys = sealing_key + masking_key + nonce_commitment + self_commitment
    return signed(identity, header(ADVERT, session) + u32(party) + keys)


def decode_advert(data: bytes, terms: SecureTerms, roster: Roster) -> Advert:
    """Read one advert of `ADVERT_BYTES`; refuses strangers to the cohort and bad signatures."""
    open_message(data, ADVERT, terms.session, "advert")
    advert = split_advert(data)
    if advert.party not in terms.members:
        raise ProtocolError(
            f"advert: party {advert.party} is not in the cohort of {len(terms.cohort)}",
            reason="cohort",
        )
    check_signature(roster, advert.party, data, "advert")
    return advert


def split_advert(data: bytes) -> Advert:
    """Cut an advert into its fields, without a check of who signed it."""
    if len(data) != ADVERT_BYTES:
        raise ProtocolError(
            f"advert of {len(data)} bytes; {ADVERT_BYTES} are due: run the same dare-agg at every "
            "party",
            reason="malformed",
        )
    party, sealing_key, masking_key, nonce, own = _ADVERT.unpack(data)
    return Advert(party, sealing_key, masking_key, nonce, own, data)


def encode_keys(session: bytes, adverts: list[Advert]) -> bytes:
    """The server's list of all adverts, as their parties signed them, ascending by party."""
    return header(KEYS, session) + u32(len(adverts)) + b"".join(a.data for a in adverts)


def decode_keys(data: bytes, terms: SecureTerms, roster: Roster) -> tuple[Advert, ...]:
    """Read and verify all adverts, ascending by party and with no key used twice.

    Raises `ProtocolError` "duplicate" otherwise.
    """
    read = open_message(data, KEYS, terms.session, "key list")
    count = read.count(ADVERT_BYTES, len(terms.cohort))
    adverts = tuple(decode_advert(read.take(ADVERT_BYTES), terms, roster) for _ in range(count))
    read.done()
    if any(a.party >= b.party for a, b in pairwise(adverts)):
        raise ProtocolError("key list: parties are not strictly ascending", reason="duplicate")
    keys = [key for a in adverts for key in (a.sealing_key, a.masking_key)]
    if len(set(keys)) != len(keys):
        raise ProtocolError("key list: a key appears twice; refused", reason="duplicate")
    return adverts


def keys_digest(terms: SecureTerms, adverts: tuple[Advert, ...]) -> bytes:
    """Binds everything so far: terms and all adverts."""
    digest = hashlib.sha256(b"dare-agg secure keys 1\0" + terms.session + u32(len(adverts)))
    for advert in adverts:
        digest.update(advert.data)
    return digest.digest()


@dataclass(frozen=True)
class ShareUpload:
    """A party's nonce, opened, and its shares ``sealed`` for each neighbour by id."""

    party: int
    nonce: bytes
    sealed: tuple[tuple[int, bytes], ...]


def encode_shares(
    identity: Identity,
    session: bytes,
    party: int,
    nonce: bytes,
    sealed: list[tuple[int, bytes]],
) -> bytes:
    """A party's second message; ``sealed`` are (receiver, `SEALED_BYTES`), ascending."""
    body = header(SHARES, session) + u32(party) + nonce + u32(len(sealed))
    return signed(identity, body + b"".join(u32(to) + data for to, data in sealed))


def decode_shares(data: bytes, terms: SecureTerms, roster: Roster) -> ShareUpload:
    """Read a share upload; refuses receivers outside the cohort, twice or out of order."""
    read = open_message(data, SHARES, terms.session, "share upload")
    party = _party(read, terms)
    nonce = read.take(NONCE_BYTES)
    sealed = _sealed_list(read, terms)
    read.take(SIGNATURE_BYTES)
    read.done()
    check_signature(roster, party, data, "share upload")
    return ShareUpload(party, nonce, sealed)


def _sealed_list(read: Reader, terms: SecureTerms) -> tuple[tuple[int, bytes], ...]:
    count = read.count(4 + SEALED_BYTES, len(terms.cohort))
    sealed = tuple((_party(read, terms), read.take(SEALED_BYTES)) for _ in range(count))
    if any(a >= b for (a, _), (b, _) in pairwise(sealed)):
        raise ProtocolError(f"{read.what}: parties are not ascending", reason="duplicate")
    return sealed


@dataclass(frozen=True)
class Delivery:
    """Nonces of all who shared, and the shares sealed for one party."""

    nonces: tuple[tuple[int, bytes], ...]
    sealed: tuple[tuple[int, bytes], ...]


def encode_delivery(session: bytes, delivery: Delivery) -> bytes:
    """What the server passes on to one party: all nonces, and the shares sealed for it."""
    parts = [header(DELIVERY, session)]
    for pairs in (delivery.nonces, delivery.sealed):
        parts.append(u32(len(pairs)))
        parts += [u32(party) + data for party, data in pairs]
    return b"".join(parts)


def decode_delivery(data: bytes, terms: SecureTerms) -> Delivery:
    """Read a delivery; `ProtocolError` "duplicate" unless parties are strictly ascending."""
    read = open_message(data, DELIVERY, terms.session, "share delivery")
    count = read.count(4 + NONCE_BYTES, len(terms.cohort))
    nonces = tuple((_party(read, terms), read.take(NONCE_BYTES)) for _ in range(count))
    if any(a >= b for (a, _), (b, _) in pairwise(nonces)):
        raise ProtocolError("share delivery: parties are not ascending", reason="duplicate")
    delivery = Delivery(nonces, _sealed_list(read, terms))
    read.done()
    return delivery


def shares_digest(keys: bytes, nonces: tuple[tuple[int, bytes], ...]) -> bytes:
    """Binds everything up to the nonces: the mask and all masks' keys hang on it."""
    digest = hashlib.sha256(b"dare-agg secure shares 1\0" + keys + u32(len(nonces)))
    for party, nonce in nonces:
        digest.update(u32(party) + nonce)
    return digest.digest()


@dataclass(frozen=True)
class VectorUpload:
    """A party's masked words, ``packed``, with the digest of the ``shares`` they hang on."""

    party: int
    shares: bytes
    packed: bytes


def encode_vector(
    identity: Identity, session: bytes, party: int, shares: bytes, packed: bytes
) -> bytes:
    """A party's third message: its packed masked words, under its signature."""
    return signed(identity, header(VECTOR, session) + u32(party) + shares + blob(packed))


def decode_vector(data: bytes, terms: SecureTerms, roster: Roster, limit: int) -> VectorUpload:
    """Read a masked vector of at most ``limit`` bytes; the words are not unpacked here."""
    read = open_message(data, VECTOR, terms.session, "masked vector")
    upload = VectorUpload(_party(read, terms), read.take(DIGEST_BYTES), read.blob(limit))
    read.take(SIGNATURE_BYTES)
    read.done()
    check_signature(roster, upload.party, data, "masked vector")
    return upload


def alive_digest(shares: bytes, alive: tuple[int, ...], dead: tuple[int, ...]) -> bytes:
    """Binds everything up to who stayed: what the parties sign before any unmasking."""
    return hashlib.sha256(
        b"dare-agg secure alive 1\0" + shares + identifiers(alive) + identifiers(dead)
    ).digest()


def encode_alive_list(session: bytes, alive: tuple[int, ...], dead: tuple[int, ...]) -> bytes:
    """The server's word on who stayed and who fell out, for the parties to sign."""
    return header(ALIVE_LIST, session) + identifiers(alive) + identifiers(dead)


def decode_alive_list(data: bytes, terms: SecureTerms) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return ``(alive, dead)``, each ascending; whether the sets are sound the caller judges."""
    read = open_message(data, ALIVE_LIST, terms.session, "alive list")
    most = len(terms.cohort)
    lists = read.identifiers(most), read.identifiers(most)
    read.done()
    return lists


def alive_body(session: bytes, party: int, digest: bytes) -> bytes:
    """What a party signs of the alive set; anyone can build it again."""
    return header(ALIVE, session) + u32(party) + digest


def decode_alive(
    data: bytes, terms: SecureTerms, roster: Roster, digest: bytes
) -> tuple[int, bytes]:
    """Return ``(party, signature)`` over exactly this alive set.

    Raises `ProtocolError` "alive" for another set.
    """
    read = open_message(data, ALIVE, terms.session, "alive signature")
    party = _party(read, terms)
    theirs = read.take(DIGEST_BYTES)
    signature = read.take(SIGNATURE_BYTES)
    read.done()
    if theirs != digest:
        raise ProtocolError(f"party {party} signed another alive set", reason="alive")
    check_signature(roster, party, data, "alive set")
    return party, signature


def encode_signatures(
    session: bytes,
    alive: tuple[int, ...],
    dead: tuple[int, ...],
    signatures: list[tuple[int, bytes]],
) -> bytes:
    """All parties' signatures over one alive set, with the set: the leave to unmask."""
    body = header(SIGNATURES, session) + identifiers(alive) + identifiers(dead)
    return body + u32(len(signatures)) + b"".join(u32(p) + s for p, s in signatures)


def decode_signatures(
    data: bytes, terms: SecureTerms
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[tuple[int, bytes], ...]]:
    """Return ``(alive, dead, ((party, signature), …))``; the signatures are not verified here."""
    read = open_message(data, SIGNATURES, terms.session, "signature list")
    most = len(terms.cohort)
    alive, dead = read.identifiers(most), read.identifiers(most)
    count = read.count(4 + SIGNATURE_BYTES, most)
    pairs = tuple((_party(read, terms), read.take(SIGNATURE_BYTES)) for _ in range(count))
    read.done()
    if any(a >= b for (a, _), (b, _) in pairwise(pairs)):
        raise ProtocolError("signature list: parties are not ascending", reason="duplicate")
    return alive, dead, pairs


def encode_reveal(
    identity: Identity,
    session: bytes,
    party: int,
    alive: bytes,
    shares: list[tuple[int, bytes]],
) -> bytes:
    """A party's last message: its shares by owner, for the alive set with digest ``alive`` only."""
    body = header(REVEAL, session) + u32(party) + alive + u32(len(shares))
    return signed(identity, body + b"".join(u32(owner) + share for owner, share in shares))


def decode_reveal(
    data: bytes, terms: SecureTerms, roster: Roster, alive: bytes
) -> tuple[int, tuple[tuple[int, bytes], ...]]:
    """Return ``(party, ((owner, share), …))``; which secret it is follows from the set.

    Raises `ProtocolError` "alive" for another set.
    """
    read = open_message(data, REVEAL, terms.session, "reveal")
    party = _party(read, terms)
    if read.take(DIGEST_BYTES) != alive:
        raise ProtocolError(f"reveal of party {party} is for another alive set", reason="alive")
    count = read.count(4 + SHARE_BYTES, len(terms.cohort))
    shares = tuple((_party(read, terms), read.take(SHARE_BYTES)) for _ in range(count))
    read.take(SIGNATURE_BYTES)
    read.done()
    if any(a >= b for (a, _), (b, _) in pairwise(shares)):
        raise ProtocolError("reveal: parties are not ascending", reason="duplicate")
    check_signature(roster, party, data, "reveal")
    return party, shares

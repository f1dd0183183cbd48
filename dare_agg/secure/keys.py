"""How a session's secrets become keys; the same derivations on both sides.

A party's seeds are 31 bytes. From one comes the X25519 key that its pairwise masks hang on,
from the other its own mask. Every derivation carries the digest of all that came before.
"""

from __future__ import annotations

import hashlib

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from dare_agg.codec.derive import derive_key
from dare_agg.errors import ProtocolError
from dare_agg.secure.encoding import u32


def masking_secret(seed: bytes, session: bytes, party: int) -> bytes:
    """The X25519 private key of a party's pairwise masks."""
    return derive_key(seed, "secure masking key", session, party, length=32)


def private_key(secret: bytes) -> X25519PrivateKey:
    """Load a private key; worth doing once, since it computes the public one."""
    return X25519PrivateKey.from_private_bytes(secret)


def public_of(secret: bytes) -> bytes:
    """The 32-byte X25519 public key of a 32-byte secret."""
    return private_key(secret).public_key().public_bytes_raw()


def agree(secret: X25519PrivateKey, public: bytes, party: int) -> bytes:
    """X25519. Raises `ProtocolError` (reason "low-order") for a key that fixes the result."""
    try:
        return secret.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise ProtocolError(
            f"the key of party {party} is of low order; nobody makes such a key by chance: refused",
            reason="low-order",
        ) from error


def sealing_key(agreed: bytes, keys_digest: bytes, sender: int, receiver: int) -> bytes:
    """Key for the shares of ``sender`` to ``receiver``; used for one message."""
    return derive_key(agreed, "secure shares", keys_digest, sender, receiver, length=32)


def sealing_context(session: bytes, sender: int, receiver: int) -> bytes:
    """Associated data of sealed shares: whose they are, for whom, in which session."""
    return b"dare-agg secure shares 1\0" + session + u32(sender) + u32(receiver)


def pair_mask_key(agreed: bytes, shares_digest: bytes, one: int, other: int) -> bytes:
    """Key of the mask that the lower id adds and the higher subtracts."""
    low, high = min(one, other), max(one, other)
    return derive_key(agreed, "secure pair mask", shares_digest, low, high, length=32)


def self_mask_key(seed: bytes, shares_digest: bytes, party: int) -> bytes:
    """Key of the mask that a party adds alone; shares of ``seed`` recover it where it stays."""
    return derive_key(seed, "secure self mask", shares_digest, party, length=32)


def self_commitment(seed: bytes, session: bytes, party: int) -> bytes:
    """SHA-256 that binds a party to the seed of its own mask before it sees the others' keys."""
    return hashlib.sha256(b"dare-agg secure self 1\0" + session + u32(party) + seed).digest()


def nonce_commitment(nonce: bytes, session: bytes, party: int) -> bytes:
    """SHA-256 that binds a party to its nonce before it sees the others': nobody picks the mask."""
    return hashlib.sha256(b"dare-agg secure nonce 1\0" + session + u32(party) + nonce).digest()

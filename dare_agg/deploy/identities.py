"""Who sent an update: Ed25519 signatures over what was sent, checked against known keys.

Flower's node authentication signs a timestamp, not the content. A client with an identity
signs the digest of its reply; the digest covers the round plan (run, round, client, keys),
so a signature fits no other round, run, client or payload.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from dare_agg.errors import ConfigError, StateError
from dare_agg.files.atomic import write_new
from dare_agg.files.json_text import read_json
from dare_agg.files.trust import read_own

_KEY = re.compile(r"[0-9a-f]{64}")


def make_identity(path: Path) -> str:
    """Write a new private key (PEM, mode 0600) and return the public key as hex.

    Refuses to overwrite: raises `ConfigError`.
    """
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    write_private(path, pem)
    return public_hex(key)


def write_private(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Create a file that only its owner reads; never overwrites one.

    Raises `ConfigError` where the path exists.
    """
    remedy = "keys are never overwritten: move it away or choose another folder"
    write_new(path, data, mode=mode, kind=ConfigError, exists=remedy)


def load_identity(path: Path | str) -> Ed25519PrivateKey:
    """Read a private key; refuses one that others may read (`ConfigError`) or could have swapped
    (`StateError`)."""
    path = Path(path)
    try:
        data = read_own(path, remedy="keep keys in a folder of this user's own", private=True)
    except OSError as error:
        raise StateError(f"identity {path} cannot be read: {error.strerror or error}") from error
    try:
        key = serialization.load_pem_private_key(data, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"identity {path} is no PEM private key: {error}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"identity {path} is a {type(key).__name__}; Ed25519 is needed")
    return key


def public_hex(key: Ed25519PrivateKey) -> str:
    """The public key of an identity, 64 hex digits."""
    raw = key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return raw.hex()


def read_identities(path: Path | str) -> dict[str, str]:
    """Read the known clients, a JSON object of name → public key (64 hex digits).

    Raises `ConfigError` for a file that cannot be read as such.
    """
    try:
        known = read_json(Path(path))
    except (OSError, ValueError) as error:
        raise ConfigError(f"identities {path} cannot be read: {error}") from error
    return check_identities(known)


def check_identities(known: object) -> dict[str, str]:
    """Check a mapping of names to public keys; raises `ConfigError` naming what is wrong."""
    if not isinstance(known, Mapping) or not known:
        raise ConfigError("identities must map at least one client name to a public key")
    for name, public in known.items():
        if not isinstance(name, str) or not isinstance(public, str) or not _KEY.fullmatch(public):
            raise ConfigError(f"identity of client {name!r:.80} is not 64 hex digits")
    if len(set(known.values())) != len(known):
        raise ConfigError("two clients have one public key; every client needs its own")
    return dict(known)

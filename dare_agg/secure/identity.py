"""Long-term identities: an Ed25519 key a party, its private half encrypted at rest.

The file is one line of JSON. The private key is sealed with ChaCha20-Poly1305 under a key
that scrypt (n = 2**15, r = 8, p = 1) makes from the passphrase; name and public key are the
associated data.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from dare_agg.codec.derive import derive_key
from dare_agg.errors import ConfigError, ProtocolError, StateError
from dare_agg.files.atomic import write_new
from dare_agg.files.json_text import parse_json
from dare_agg.files.trust import open_own, read_own

KEY_BYTES = 32
SIGNATURE_BYTES = 64
MAX_NAME = 64
MIN_PASSPHRASE = 8
_SCRYPT_N = 1 << 15
_FORMAT = "dare-agg identity 1"
_PUBLIC_FORMAT = "dare-agg public key 1"
_REMEDY = "keep keys in a folder of this user's own"


@dataclass(frozen=True)
class Identity:
    """A party's own key pair; ``secret`` is the 32-byte Ed25519 seed and never printed."""

    name: str
    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        check_name(self.name)
        if len(self.secret) != KEY_BYTES:
            raise ConfigError(f"an identity's key has {len(self.secret)} bytes; 32 are needed")

    @property
    def public(self) -> bytes:
        """The 32-byte Ed25519 public key."""
        return Ed25519PrivateKey.from_private_bytes(self.secret).public_key().public_bytes_raw()

    def sign(self, message: bytes) -> bytes:
        """The 64-byte Ed25519 signature of ``message``."""
        return Ed25519PrivateKey.from_private_bytes(self.secret).sign(message)

    def sealing_key(self, purpose: str) -> bytes:
        """A symmetric key that only this identity can derive."""
        return derive_key(self.secret, "secure seal", purpose.encode(), length=32)


def new_identity(name: str) -> Identity:
    """Make an identity from the system's randomness."""
    return Identity(name, os.urandom(KEY_BYTES))


def key_fingerprint(public: bytes) -> str:
    """What people compare over another channel: SHA-256 of the public key, in groups."""
    digest = hashlib.sha256(b"dare-agg public key 1\0" + public).hexdigest()
    return "-".join(digest[at : at + 4] for at in range(0, 40, 4))


def verify(public: bytes, signature: bytes, message: bytes, who: str) -> None:
    """Raise `ProtocolError` (reason "signature") unless the signature holds."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
    except (InvalidSignature, ValueError) as error:
        raise ProtocolError(
            f"the signature of {who} is wrong; its message was altered or made for another "
            "round: refused",
            reason="signature",
        ) from error


def check_name(name: str) -> None:
    """Raise `ConfigError` unless a roster can hold the name."""
    if not 0 < len(name) <= MAX_NAME or not name.isprintable() or name != name.strip():
        raise ConfigError(
            f"name {name[:80]!r}; 1 to {MAX_NAME} printable characters without outer spaces "
            "are needed"
        )


def write_identity(path: Path, identity: Identity, passphrase: str) -> None:
    """Write the identity, encrypted, readable by its owner alone; never overwrites.

    Raises `ConfigError` for a passphrase that is too short and a path that exists.
    """
    if len(passphrase) < MIN_PASSPHRASE:
        raise ConfigError(
            f"the passphrase has {len(passphrase)} characters; at least {MIN_PASSPHRASE} are needed"
        )
    salt, nonce = os.urandom(16), os.urandom(12)
    head = _head(identity.name, identity.public)
    sealed = ChaCha20Poly1305(_passphrase_key(passphrase, salt)).encrypt(
        nonce, identity.secret, head
    )
    record = {
        "format": _FORMAT,
        "name": identity.name,
        "public": identity.public.hex(),
        "salt": salt.hex(),
        "sealed": base64.b64encode(nonce + sealed).decode(),
    }
    _write(path, record, 0o600)


def write_public(path: Path, name: str, public: bytes) -> None:
    """Write the half of an identity that others may see; never overwrites."""
    check_name(name)
    _write(path, {"format": _PUBLIC_FORMAT, "name": name, "public": public.hex()}, 0o644)


def _write(path: Path, record: dict[str, str], mode: int) -> None:
    remedy = "choose another name, keys are never overwritten"
    write_new(path, json.dumps(record).encode() + b"\n", mode=mode, exists=remedy)


def read_identity(path: Path, passphrase: str) -> Identity:
    """Read and decrypt an identity.

    Raises `StateError` for a wrong passphrase or file or one that another user could have
    swapped, `ConfigError` for a file that others may read.
    """
    try:
        with os.fdopen(open_own(path, os.O_RDONLY, remedy=_REMEDY), "rb") as file:
            text, mode = file.read(), os.fstat(file.fileno()).st_mode & 0o777
    except OSError as error:
        raise _no_file(path, error) from error
    record = _parse(path, text)
    if record["format"] != _FORMAT:
        raise StateError(f"{path} holds a public key alone; give the private one, encrypted")
    if mode & 0o077:
        raise ConfigError(f"{path} has mode {mode:o}; others may read it: chmod 600 it")
    try:
        salt = bytes.fromhex(record["salt"])
        sealed = base64.b64decode(record["sealed"], validate=True)
        secret = ChaCha20Poly1305(_passphrase_key(passphrase, salt)).decrypt(
            sealed[:12], sealed[12:], _head(record["name"], bytes.fromhex(record["public"]))
        )
    except InvalidTag as error:
        raise StateError(f"{path}: the passphrase is wrong or the file was altered") from error
    except (KeyError, ValueError) as error:
        raise StateError(f"{path} is no identity file: {error}") from error
    return Identity(record["name"], secret)


def read_public(path: Path) -> dict[str, str]:
    """The unencrypted fields of a key file, among them ``name`` and ``public`` (hex).

    Raises `StateError` for what is no key file.
    """
    try:
        return _parse(path, path.read_bytes())
    except OSError as error:
        raise _no_file(path, error) from error


def read_trusted(path: Path) -> bytes:
    """A public key to be trusted, from a file that no other user can have put there."""
    try:
        return bytes.fromhex(_parse(path, read_own(path, remedy=_REMEDY))["public"])
    except OSError as error:
        raise _no_file(path, error) from error


def _no_file(path: Path, error: OSError) -> StateError:
    return StateError(f"{path}: {error.strerror}; make one with dare-agg keys make")


def _parse(path: Path, text: bytes) -> dict[str, str]:
    try:
        record = parse_json(text)
        if record["format"] not in (_FORMAT, _PUBLIC_FORMAT) or not all(
            isinstance(v, str) for v in record.values()
        ):
            raise ValueError("another format")
        check_name(record["name"])
        if len(bytes.fromhex(record["public"])) != KEY_BYTES:
            raise ValueError("public key of another length")
    except (ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
        raise StateError(
            f"{path} is no key file ({error}); make one with dare-agg keys make"
        ) from error
    return record


def _head(name: str, public: bytes) -> bytes:
    return _FORMAT.encode() + b"\0" + public + name.encode()


def _passphrase_key(passphrase: str, salt: bytes) -> bytes:
    return Scrypt(salt=salt, length=32, n=_SCRYPT_N, r=8, p=1).derive(passphrase.encode())


VARIABLE = "DARE_AGG_PASSPHRASE"


def find_passphrase(file: Path | None = None) -> str | None:
    """Return the passphrase of ``file`` (its first line), else of the environment, else None.

    Raises `ConfigError` for a file that others may read, `StateError` for one that cannot be
    read or is empty.
    """
    if file is None:
        return os.environ.get(VARIABLE) or None
    try:
        mode = file.stat().st_mode & 0o777
        if mode & 0o077:
            raise ConfigError(
                f"passphrase file {file} has mode {mode:o}; others may read it: chmod 600 it"
            )
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise StateError(f"passphrase file {file} cannot be read: {error}") from error
    if not lines or not lines[0]:
        raise StateError(f"passphrase file {file} is empty; write the passphrase on its first line")
    return lines[0]


def need_passphrase(file: Path | None = None) -> str:
    """`find_passphrase` where nobody can be asked. Raises `ConfigError` when there is none."""
    found = find_passphrase(file)
    if found is None:
        raise ConfigError(
            f"no passphrase for the private key; set {VARIABLE} or name a passphrase file"
        )
    return found

"""Secrets between two messages: sealed files that only one identity opens.

Flower may start a new process for each message, so a session's state must outlive one. It
never lies in clear: files are ChaCha20-Poly1305 in pieces, under a key that hangs on the
identity's private key and a random salt of the file. The header is ``"DSV1"``, the salt and
the length of the content (u64); each piece has its number as nonce, and header, place,
session and name as associated data. Files are replaced as a whole and removed once the
session is over.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from dare_agg.codec.derive import derive_key
from dare_agg.errors import ProtocolError, StateError
from dare_agg.files.atomic import replace_file
from dare_agg.files.cache import cache_folder
from dare_agg.files.trust import open_own, own_folder, read_own
from dare_agg.secure.encoding import blob, u64
from dare_agg.secure.identity import Identity, key_fingerprint

_MAGIC = b"DSV1"
_SALT_BYTES, _TAG_BYTES = 32, 16
_HEADER_BYTES = len(_MAGIC) + _SALT_BYTES + 8
_PIECE_BYTES = 1 << 24
_REMEDY = "name a folder of this user's own (secure-state in the node config)"


def default_folder() -> Path:
    """A folder in memory where the system has one for this user, else under the cache."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and Path(runtime).is_dir():
        return Path(runtime) / "dare-agg"
    return cache_folder("secure")


@dataclass(frozen=True)
class Vault:
    """The sealed files of one identity under ``root``, by session and name."""

    root: Path
    identity: Identity = field(repr=False)

    @property
    def folder(self) -> Path:
        """The folder of this identity's secrets, named by its key."""
        return self.root / key_fingerprint(self.identity.public).replace("-", "")

    def put(self, session: bytes, name: str, content: bytes) -> None:
        """Seal ``content`` in place of what was there, on disk when this returns.

        Raises `StateError` when it cannot be written, or not where no other user could swap it.
        """
        header = _MAGIC + os.urandom(_SALT_BYTES) + u64(len(content))
        box = ChaCha20Poly1305(self._key(header))
        view = memoryview(content)

        def sealed() -> Iterator[bytes]:
            yield header
            for number, start in enumerate(range(0, max(1, len(view)), _PIECE_BYTES)):
                context = _context(header, number, session, name)
                yield box.encrypt(_nonce(number), view[start : start + _PIECE_BYTES], context)

        self._make_folder()
        replace_file(self._path(session, name), sealed(), mode=0o600, remedy=_REMEDY)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until no other process of this party is at a step, then keep others out.

        Without it two messages at once could both find a step not yet taken.
        """
        self._make_folder()
        try:
            handle = open_own(self.folder / "lock", os.O_RDWR | os.O_CREAT, remedy=_REMEDY)
        except OSError as error:
            raise self._unwritten(error) from error
        with os.fdopen(handle, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def get(self, session: bytes, name: str) -> bytes:
        """Open what was put last.

        Raises `ProtocolError` (reason "state") when nothing was put, or not by this identity,
        `StateError` where another user could have swapped it.
        """
        path = self._path(session, name)
        try:
            data = read_own(path, remedy=_REMEDY)
        except OSError as error:
            raise ProtocolError(
                f"this party holds no {name} of session {session.hex()[:12]}: it is over, or "
                "another one was begun since: refused",
                reason="state",
            ) from error
        header, at = data[:_HEADER_BYTES], _HEADER_BYTES
        left = int.from_bytes(header[-8:], "little") if len(header) == _HEADER_BYTES else 0
        whole = len(data) - _HEADER_BYTES - left
        if header[:4] != _MAGIC or whole != max(1, -(-left // _PIECE_BYTES)) * _TAG_BYTES:
            raise self._unopened(path)
        box = ChaCha20Poly1305(self._key(header))
        pieces = []
        for number in range(max(1, -(-left // _PIECE_BYTES))):
            count = min(left - number * _PIECE_BYTES, _PIECE_BYTES) + _TAG_BYTES
            context = _context(header, number, session, name)
            try:
                pieces.append(box.decrypt(_nonce(number), data[at : at + count], context))
            except InvalidTag as error:
                raise self._unopened(path) from error
            at += count
        return b"".join(pieces)

    def holds(self, session: bytes, name: str) -> bool:
        """Whether a secret of this name was sealed for the session and not removed."""
        return self._path(session, name).is_file()

    def drop(self, session: bytes, name: str | None = None) -> None:
        """Remove a session's files, or the named one."""
        for path in self.folder.glob(f"{session.hex()}.{name or '*'}"):
            path.unlink(missing_ok=True)

    def drop_all(self) -> None:
        """Remove the files of every session: their secrets serve nobody any more."""
        for path in self.folder.glob("*.*"):
            with contextlib.suppress(OSError):
                path.unlink()

    def _make_folder(self) -> None:
        try:
            own_folder(self.folder, remedy=_REMEDY)
        except OSError as error:
            raise self._unwritten(error) from error

    def _unwritten(self, error: OSError) -> StateError:
        return StateError(
            f"{self.folder}: {error.strerror}; a session's state cannot be kept there: {_REMEDY}"
        )

    def _path(self, session: bytes, name: str) -> Path:
        return self.folder / f"{session.hex()}.{name}"

    def _key(self, header: bytes) -> bytes:
        salt = header[len(_MAGIC) : len(_MAGIC) + _SALT_BYTES]
        return derive_key(self.identity.sealing_key("vault"), "secure vault", salt, length=32)

    @staticmethod
    def _unopened(path: Path) -> ProtocolError:
        return ProtocolError(
            f"{path} does not open: it was altered or sealed by another identity; remove it",
            reason="state",
        )


def _nonce(number: int) -> bytes:
    return number.to_bytes(12, "little")


def _context(header: bytes, number: int, session: bytes, name: str) -> bytes:
    return header + u64(number) + session + blob(name.encode())

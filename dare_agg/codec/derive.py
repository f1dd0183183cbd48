"""Keys and keystreams: the only source of randomness that both ends must agree on.

Everything is AES-128 in counter mode and HKDF-SHA256, so the bits are the same on every
platform and with every library version.
"""

from __future__ import annotations

import struct

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from dare_agg.errors import ConfigError

KEY_BYTES = 16
_BLOCK_BYTES = 16


def derive_key(secret: bytes, label: str, *context: int | bytes, length: int = KEY_BYTES) -> bytes:
    """Derive ``length`` bytes from a secret, bound to a label and a context.

    HKDF-SHA256 (RFC 5869) without salt. The info is ``"dare-agg 1"``, then the label and
    each context item, each with a type byte (``s`` text, ``b`` bytes, ``i`` integer) and its
    length as u32 little-endian; integers are u64 little-endian.
    """
    info = [b"dare-agg 1", _item(b"s", label.encode())]
    for item in context:
        if isinstance(item, bytes):
            info.append(_item(b"b", item))
        else:
            info.append(_item(b"i", struct.pack("<Q", item)))
    return HKDF(SHA256(), length, salt=None, info=b"".join(info)).derive(secret)


def _item(kind: bytes, data: bytes) -> bytes:
    return kind + struct.pack("<I", len(data)) + data


def seed_secret(seed: int) -> bytes:
    """Turn a user's integer seed (0 to 2**64 − 1) into a secret for `derive_key`.

    Raises `ConfigError` for another number.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 64:
        raise ConfigError(f"seed = {seed!r}; a whole number from 0 to 2**64 - 1 is needed")
    return b"dare-agg seed\0" + struct.pack("<Q", seed)


class Keystream:
    """AES-128-CTR keystream of a key, readable from any byte.

    The counter is the 128-bit big-endian block number, starting at 0. Reading on where the
    last call ended costs no new set-up.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise ConfigError(f"a key has {len(key)} bytes; {KEY_BYTES} are needed")
        self._algorithm = algorithms.AES128(key)
        self._zeros = b""
        self._encryptor: CipherContext | None = None
        self._position = -1

    def read(
        self, start: int, count: int, out: NDArray[np.uint8] | None = None
    ) -> NDArray[np.uint8]:
        """Return bytes ``start`` to ``start + count`` of the keystream.

        They lie in ``out`` where that has room for them and 32 more.
        """
        skip = start % _BLOCK_BYTES
        if start != self._position or self._encryptor is None:
            counter = (start // _BLOCK_BYTES).to_bytes(_BLOCK_BYTES, "big")
            self._encryptor = Cipher(self._algorithm, modes.CTR(counter)).encryptor()
            wanted = skip + count
        else:
            skip, wanted = 0, count
        if len(self._zeros) < wanted:
            self._zeros = bytes(wanted)
        # update_into asks for room for one block more than it writes.
        if out is None:
            out = np.empty(wanted + _BLOCK_BYTES, np.uint8)
        self._encryptor.update_into(memoryview(self._zeros)[:wanted], out.data)
        self._position = start + count
        return out[skip:wanted]

    def words(
        self, start: int, count: int, out: NDArray[np.uint8] | None = None
    ) -> NDArray[np.uint32]:
        """Return u32 words ``start`` to ``start + count``, each little-endian; see `read`."""
        data = self.read(4 * start, 4 * count, out)
        if data.ctypes.data % 4:
            data = data.copy()
        return data.view("<u4").astype(np.uint32, copy=False)

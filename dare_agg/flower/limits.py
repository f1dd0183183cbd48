"""How much one reply may hold: known before it arrives, from what was asked.

A reply over its `ReplyLimit` is refused before it is read where it comes from a SuperLink, and
before anything of it is looked at closely in any case.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flwr.app import ArrayRecord, Message, RecordDict

from dare_agg.errors import UpdateError
from dare_agg.flower.transport import PIECE_BYTES

# Bytes of what the app adds of its own to a reply, metrics above all.
OWN_BYTES = 1 << 20
# Of an array that holds a piece: names, shape, and the identifiers Flower gives its parts.
_PIECE_ROOM = 1024
MAX_KEYS = 10_000
# Flower stores each record, array and chunk of 5 MiB by itself, and each is asked for by itself.
MAX_PARTS = 1_000
# A message, its content, a record, an array, a chunk.
MAX_DEPTH = 5


@dataclass(frozen=True)
class ReplyLimit:
    """Most that a reply may hold: payloads of ``payload`` bytes, and ``own`` bytes of the app's.

    >>> limit = ReplyLimit(payload=200_000)
    >>> limit.arrays, limit.rest, limit.parts
    (1248576, 1050624, 1004)
    """

    payload: int = 0
    own: int = OWN_BYTES

    @property
    def arrays(self) -> int:
        """Bytes of all arrays together."""
        return self.payload + self.own

    @property
    def rest(self) -> int:
        """Bytes of everything that is not the data of an array."""
        return self.own + _PIECE_ROOM * self._pieces

    @property
    def keys(self) -> int:
        """Names in all records together."""
        return MAX_KEYS + self._pieces

    @property
    def parts(self) -> int:
        """Records, arrays and chunks, as Flower stores them."""
        return MAX_PARTS + 2 * self._pieces

    @property
    def _pieces(self) -> int:
        return -(-self.payload // PIECE_BYTES)

    def check(self, reply: Message) -> None:
        """Raise `UpdateError` (reason "oversized") where a reply holds more.

        In time that the limit bounds, whatever the reply holds.
        """
        if reply.has_error():
            need(len(reply.error.reason or ""), self.rest, "bytes of an error's text")
            return
        content: RecordDict = reply.content
        need(len(content), self.parts, "records")
        need(sum(map(len, content.values())), self.keys, "keys")
        arrays = rest = 0
        for name, record in content.items():
            rest += len(name) + sum(map(len, record))
            if isinstance(record, ArrayRecord):
                for array in record.values():
                    arrays += len(array.data)
                    rest += len(array.dtype) + len(array.stype) + 8 * len(array.shape)
            else:
                rest += sum(self._size(value) for value in record.values())
        need(arrays, self.arrays, "bytes of arrays")
        need(rest, self.rest, "bytes of text, numbers and names")

    def _size(self, value: Any) -> int:
        if isinstance(value, str | bytes):
            return len(value)
        if not isinstance(value, list):
            return 8
        # A long list is not walked through.
        if len(value) > self.rest or not isinstance(value[0] if value else 0, str | bytes):
            return 8 * len(value)
        return 8 * len(value) + sum(map(len, value))


def need(found: int, most: int, what: str) -> None:
    """Raise `UpdateError` (reason "oversized") for more than there may be."""
    if found > most:
        raise UpdateError(
            f"the reply has {found:,} {what}, at most {most:,} answer what was asked; an app with "
            "larger records of its own sets reply_room",
            reason="oversized",
        )


__all__ = ["MAX_DEPTH", "OWN_BYTES", "ReplyLimit", "need"]

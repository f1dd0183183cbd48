"""Decoded groups that are kept from tile to tile, in one budget for all updates.

A tile that ends inside a group of survivors leaves the rest of it to the next one. What is read
to its end is let go of at once, so a merge whose tiles are larger than its groups keeps none.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

from dare_agg.vectors.layout import FloatVector

# Bytes a thread keeps; the group that was used longest ago goes first.
KEPT_BYTES = 1 << 24


class DecodedGroups(threading.local):
    """A thread's own; keys are an update's token and the number of a group."""

    def __init__(self) -> None:
        self._groups: OrderedDict[tuple[object, int], FloatVector] = OrderedDict()
        self.nbytes = 0

    def find(self, update: object, group: int) -> FloatVector | None:
        """Return the group if it is kept."""
        return self._groups.get((update, group))

    def keep(self, update: object, group: int, values: FloatVector) -> None:
        """Keep a group that was just decoded, within the budget."""
        self._groups[update, group] = values
        self.nbytes += values.nbytes
        while self.nbytes > KEPT_BYTES:
            self.nbytes -= self._groups.popitem(last=False)[1].nbytes

    def let_go(self, update: object, group: int) -> None:
        """Forget a group, if it is kept; arrays that somebody still holds stay valid."""
        values = self._groups.pop((update, group), None)
        if values is not None:
            self.nbytes -= values.nbytes


DECODED = DecodedGroups()

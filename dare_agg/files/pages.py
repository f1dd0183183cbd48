"""Pages of a mapped file, handed back on the way through: a pass over it costs no memory.

The kernel keeps what was written and may keep what was read; only this process lets go.
"""

from __future__ import annotations

import mmap

_PASSED = 16 << 20


class Pages:
    """The pages of one map, let go of whenever another 16 MiB were passed."""

    def __init__(self, mapped: mmap.mmap) -> None:
        self._mapped = mapped
        self._passed = 0

    def passed(self, nbytes: int) -> None:
        """Note that so many more bytes were read or written and are not needed again soon."""
        self._passed += nbytes
        if self._passed >= _PASSED and hasattr(mmap, "MADV_DONTNEED"):
            self._passed = 0
            self._mapped.madvise(mmap.MADV_DONTNEED)

"""A file that one process at a time reads, thinks about and replaces."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dare_agg.files.trust import open_own


@contextmanager
def locked(path: Path, *, remedy: str) -> Iterator[None]:
    """A context that no other process is in for this file; it waits its turn.

    The lock is a file beside it, ``<name>.lock``. Raises as `dare_agg.files.trust.open_own`.
    """
    beside = path.with_name(f"{path.name}.lock")
    handle = open_own(beside, os.O_RDWR | os.O_CREAT, remedy=remedy)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)

"""A client's cache of versions: what is kept, whose it is, and what goes when there is too much."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
from collections.abc import Callable, Collection
from pathlib import Path

from dare_agg.errors import BaseMismatchError, StateError

LOG = logging.getLogger(__name__)
KEEP_BYTES = 8 << 30
REMEDY = "name a folder of this user's own (cache in the node config, or DARE_AGG_CACHE)"
_BLOCK = 512
_VERSION = re.compile(r"[0-9a-f]{64}")


def is_version(name: str) -> bool:
    """Whether a name is one of a version, 64 hex digits."""
    return _VERSION.fullmatch(name) is not None


def check_version(name: str) -> None:
    """Raise `BaseMismatchError` for a name that is none of a version."""
    if not is_version(name):
        raise BaseMismatchError(f"version {name[:80]!r} is not 64 hex digits")


def owner_of(client: str) -> str:
    """What a client's files begin with: clients of one machine keep theirs apart."""
    return hashlib.sha256(client.encode()).hexdigest()[:12]


def forget(path: Path) -> None:
    """Remove a file; one that is not there, or cannot be removed, is let be."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def try_to(write: Callable[[], object]) -> None:
    """Write to the cache; a cache that cannot be written costs bytes, not the round."""
    try:
        write()
    except StateError as error:
        LOG.warning("version cache: %s", error)


def trim(folder: Path, own: Collection[Path], keep_bytes: int) -> None:
    """Remove what was not used for longest, but ``own``, until the folder fits its bound."""
    found = []
    for path in folder.glob("*/*"):
        try:
            stat = path.stat()
        except OSError:  # another client's process was faster
            continue
        if stat.st_size:  # a lock has none
            found.append((stat.st_mtime, _BLOCK * stat.st_blocks, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= keep_bytes:
            return
        if path not in own:
            forget(path)
            total -= size

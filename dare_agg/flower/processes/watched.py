"""Whether files have changed: their sizes, times and numbers, not their contents."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

# Of each file: path, size, time of its last change in ns, number of its inode.
Seen = tuple[tuple[str, int, int, int], ...]


def signature(paths: Iterable[Path]) -> Seen:
    """The state of these files, and of all files below these folders; what is missing has one too.

    Links are followed, but not to folders.
    """
    return tuple(sorted(found for path in paths for found in _of(path)))


def _of(path: Path) -> Iterator[tuple[str, int, int, int]]:
    if not path.is_dir():
        yield _state(str(path))
        return
    for folder, _, names in os.walk(path):
        for name in names:
            yield _state(os.path.join(folder, name))


def _state(path: str) -> tuple[str, int, int, int]:
    try:
        found = os.stat(path)
    except OSError:
        return path, -1, 0, 0
    return path, found.st_size, found.st_mtime_ns, found.st_ino

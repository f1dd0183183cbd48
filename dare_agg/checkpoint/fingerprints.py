"""Fingerprints of files that have not changed, remembered: hashing a model takes longer than
merging sparse updates into it.

A file counts as unchanged while its path, inode, size, and times of change are (as git
judges). Whatever changed in the last seconds is not remembered: its clock may be too coarse.
Nothing is believed that another user could have put there.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterable
from pathlib import Path

from dare_agg.errors import StateError
from dare_agg.files.atomic import replace_file
from dare_agg.files.cache import cache_folder
from dare_agg.files.trust import own_folder, read_own

_SETTLED_SECONDS = 3.0


def recall(files: Iterable[Path], layout: str) -> str | None:
    """Return the fingerprint known for these files over a layout (its fingerprint)."""
    try:
        text = read_own(_place(files, layout), remedy="").decode("ascii").strip()
        return text if len(bytes.fromhex(text)) == 32 else None
    except (OSError, ValueError, StateError):
        return None


def remember(files: Iterable[Path], layout: str, fingerprint: str) -> None:
    """Keep a fingerprint for `recall`; where that is impossible, nothing happens."""
    chosen = list(files)
    with contextlib.suppress(OSError, StateError):
        latest = max((max(s.st_mtime, s.st_ctime) for s in (f.stat() for f in chosen)), default=0.0)
        if time.time() - latest < _SETTLED_SECONDS:
            return
        own_folder(cache_folder("fingerprints"), remedy="")
        replace_file(_place(chosen, layout), (f"{fingerprint}\n".encode("ascii"),))


def _place(files: Iterable[Path], layout: str) -> Path:
    digest = hashlib.sha256(layout.encode())
    for file in sorted(file.resolve() for file in files):
        s = file.stat()
        facts = (str(file), s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns)
        digest.update(repr(facts).encode())
    return cache_folder("fingerprints") / digest.hexdigest()[:40]

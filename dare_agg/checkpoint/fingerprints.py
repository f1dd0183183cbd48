"""Fingerprints of files that have not changed, remembered: hashing a model takes longer than
merging sparse updates into it.

A file counts as unchanged while its path, inode, size, and times of change are (as git
judges). Whatever changed in the last seconds is not remembered: its clock may be too coarse.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Iterable
from pathlib import Path

from dare_agg.files.cache import cache_folder

_SETTLED_SECONDS = 3.0


def recall(files: Iterable[Path], layout: str) -> str | None:
    """Return the fingerprint known for these files over a layout (its fingerprint)."""
    try:
        text = _place(files, layout).read_text(encoding="ascii").strip()
        return text if len(bytes.fromhex(text)) == 32 else None
    except (OSError, ValueError):
        return None


def remember(files: Iterable[Path], layout: str, fingerprint: str) -> None:
    """Keep a fingerprint for `recall`; where that is impossible, nothing happens."""
    chosen = list(files)
    with contextlib.suppress(OSError):
        latest = max(max(s.st_mtime, s.st_ctime) for s in (f.stat() for f in chosen))
        if time.time() - latest < _SETTLED_SECONDS:
            return
        place = _place(chosen, layout)
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = place.with_name(f"{place.name}.{os.getpid()}")
        temporary.write_text(fingerprint + "\n", encoding="ascii")
        os.replace(temporary, place)


def _place(files: Iterable[Path], layout: str) -> Path:
    digest = hashlib.sha256(layout.encode())
    for file in sorted(file.resolve() for file in files):
        s = file.stat()
        facts = (str(file), s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns)
        digest.update(repr(facts).encode())
    return cache_folder("fingerprints") / digest.hexdigest()[:40]

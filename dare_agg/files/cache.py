"""Where this machine keeps what can be made again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(part: str = "") -> Path:
    """Return ``$DARE_AGG_CACHE``, by default ``~/.cache/dare-agg``, or a folder inside it."""
    root = os.environ.get("DARE_AGG_CACHE") or "~/.cache/dare-agg"
    return Path(root).expanduser() / part

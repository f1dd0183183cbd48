"""Files that are replaced as one: all of the new one, or what was there before."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from dare_agg.errors import StateError


def write_atomically(path: Path, parts: Iterable[bytes | memoryview], mode: int = 0o644) -> None:
    """Write a file so that ``path`` holds either all of it or what it held before.

    Raises `StateError` when the disk is full or the folder cannot be written.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with os.fdopen(handle, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        raise StateError(
            f"{path} was not written: {error.strerror or error}; the last good state is kept: "
            "free space or fix the permissions, then resume"
        ) from error

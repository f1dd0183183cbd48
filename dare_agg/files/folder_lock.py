"""A folder that one process at a time writes to."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from dare_agg.errors import StateError

_NAME = "lock"


class FolderLock:
    """The file ``lock`` of a folder, held from `claim` to `release` or the process's end."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._handle: int | None = None

    def claim(self) -> None:
        """Make the folder and be the only one that writes there; does nothing where that is so.

        Raises `StateError` where it cannot be written or another process is at work: after a
        crash of the SuperLink its run may still be going on.
        """
        if self._handle is not None:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(self._folder / _NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StateError(
                f"{self._folder} cannot be written: {error.strerror or error}; fix the "
                "permissions or free space"
            ) from error
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            raise StateError(
                f"another run is at work in {self._folder}; stop it (flwr ls, flwr stop), or name "
                "another output folder"
            ) from error
        self._handle = handle

    def release(self) -> None:
        """Let others write here again."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

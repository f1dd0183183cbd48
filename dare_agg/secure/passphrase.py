"""Where a passphrase comes from: a file, the environment, or the person at the terminal."""

from __future__ import annotations

import os
from pathlib import Path

from dare_agg.errors import ConfigError, StateError

VARIABLE = "DARE_AGG_PASSPHRASE"


def find_passphrase(file: Path | None = None) -> str | None:
    """Return the passphrase of ``file`` (its first line), else of the environment, else None.

    Raises `ConfigError` for a file that others may read, `StateError` for one that cannot be
    read or is empty.
    """
    if file is None:
        return os.environ.get(VARIABLE) or None
    try:
        mode = file.stat().st_mode & 0o777
        if mode & 0o077:
            raise ConfigError(
                f"passphrase file {file} has mode {mode:o}; others may read it: chmod 600 it"
            )
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise StateError(f"passphrase file {file} cannot be read: {error}") from error
    if not lines or not lines[0]:
        raise StateError(f"passphrase file {file} is empty; write the passphrase on its first line")
    return lines[0]


def need_passphrase(file: Path | None = None) -> str:
    """`find_passphrase` where nobody can be asked. Raises `ConfigError` when there is none."""
    found = find_passphrase(file)
    if found is None:
        raise ConfigError(
            f"no passphrase for the private key; set {VARIABLE} or name a passphrase file"
        )
    return found

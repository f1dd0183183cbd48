"""Files and folders that appear as a whole: all of the new one, or what was there before.

A draft is written beside its place, flushed to the disk and renamed over it; then the folder
that names it is flushed. A draft's name cannot be guessed and must be new, so that a link
which somebody else has planted is never followed.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from dare_agg.errors import DareError, StateError

REMEDY = "free space or fix the permissions"
# Linux's names; a system without one of them has nothing to ask for.
_NEW = os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)


def replace_file(
    path: Path,
    parts: Iterable[bytes | memoryview],
    *,
    mode: int = 0o644,
    kind: type[DareError] = StateError,
    remedy: str = REMEDY,
) -> None:
    """Write a file so that ``path`` holds either all of ``parts`` or what it held before.

    Raises ``kind`` with ``remedy`` where the disk is full or the folder cannot be written.
    """
    with file_draft(path, mode=mode, kind=kind, remedy=remedy) as file:
        for part in parts:
            file.write(part)


@contextlib.contextmanager
def file_draft(
    path: Path,
    *,
    mode: int = 0o644,
    kind: type[DareError] = StateError,
    remedy: str = REMEDY,
) -> Iterator[BinaryIO]:
    """A file to write, put in place of ``path`` when the context ends without an error.

    Raises ``kind`` with ``remedy`` for whatever the disk refuses, in the context too.
    """
    draft = draft_beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(draft, os.O_RDWR | _NEW, mode), "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
        sync_folder(path.parent)
    except OSError as error:
        raise kind(f"{path} was not written: {error.strerror or error}; {remedy}") from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


def write_new(
    path: Path,
    data: bytes,
    *,
    mode: int = 0o600,
    kind: type[DareError] = StateError,
    exists: str = "choose another name",
) -> None:
    """Write a file that must not exist yet, on the disk when this returns.

    Raises ``kind``, with ``exists`` as the remedy where something stands there already, be it
    a link to nothing; half a file is not left behind.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | _NEW, mode)
    except FileExistsError as error:
        raise kind(f"{path} exists; {exists}") from error
    except OSError as error:
        raise kind(f"{path} was not written: {error.strerror or error}; {REMEDY}") from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise kind(f"{path} was not written: {error.strerror or error}; {REMEDY}") from error
        raise


@contextlib.contextmanager
def folder_draft(path: Path) -> Iterator[Path]:
    """A new folder, put in place of ``path`` when the context ends without an error.

    Raises `OSError`.
    """
    draft = draft_beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.mkdir()
        yield draft
        put_in_place(draft, path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def draft_beside(path: Path) -> Path:
    """A name in the folder of ``path`` that nobody can have planted anything at.

    Whoever makes it must still insist that it is new (O_EXCL, mkdir).
    """
    return path.absolute().with_name(f".{path.name}.{secrets.token_hex(8)}.part")


def put_in_place(draft: Path, path: Path, *, durable: bool = True) -> None:
    """Rename a finished draft, a file or a folder, to ``path``; what stood there is removed.

    A folder cannot be renamed over another: the old one steps aside first, and comes back
    where the rename fails. ``durable`` flushes all of the draft to the disk before. Raises
    `OSError`.
    """
    if durable:
        _sync_all(draft)
    if not draft.is_dir() or not path.exists():
        os.replace(draft, path)
    else:
        aside = draft_beside(path)
        os.replace(path, aside)
        try:
            os.replace(draft, path)
        except OSError:
            os.replace(aside, path)
            raise
        shutil.rmtree(aside, ignore_errors=True) if aside.is_dir() else aside.unlink()
    if durable:
        sync_folder(path.absolute().parent)


def sync_folder(folder: Path) -> None:
    """Have a folder's names on the disk, not only the files that they name."""
    _sync(folder, getattr(os, "O_DIRECTORY", 0))


def _sync_all(draft: Path) -> None:
    if not draft.is_dir():
        _sync(draft)
        return
    for where, _, names in os.walk(draft):
        for name in names:
            _sync(Path(where, name))
        sync_folder(Path(where))


def _sync(path: Path, flags: int = 0) -> None:
    handle = os.open(path, os.O_RDONLY | flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""Whose files these are: what must stay ours is kept where no other user can swap it.

Who may write a folder can replace what lies in it, and who may write the folder above can
replace the folder. So every part of a path, from the root on, must belong to this user or to
root and be writable by its owner alone. Three things look alike and are harmless: a sticky
folder such as /tmp, where others can make names but not take ours away (whatever they made
first is theirs, and refused as such); a folder shared with a group that has no other member
(the private group that many systems give each user); and links of this user's or root's own,
which are followed part by part. The last part is opened with O_NOFOLLOW and looked at by
`os.fstat`, so nothing can change between the look and the use.
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
import stat
from pathlib import Path

from dare_agg.errors import ConfigError, StateError

_MOST_LINKS = 40


def own_folder(folder: Path, *, remedy: str) -> Path:
    """Make a folder, and those above it that are missing, for this user alone (mode 0700).

    Raises `StateError` with ``remedy`` where another user could swap it or what lies in it,
    `OSError` where it cannot be made.
    """
    missing = []
    present = folder.absolute()
    while not os.path.lexists(present):
        missing.append(present)
        present = present.parent
    check_folder(present, remedy=remedy)
    for place in reversed(missing):
        try:
            place.mkdir(mode=0o700)
        except FileExistsError:  # another process was first; it is looked at below
            continue
    if missing:
        check_folder(folder, remedy=remedy)
    return folder


def check_folder(folder: Path, *, remedy: str) -> None:
    """Raise `StateError` with ``remedy`` where another user could swap ``folder`` or its files,
    `OSError` where it is none."""
    place = _resolved(folder, remedy)
    found = place.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(place))
    _check(place, found, folder, remedy)


def open_own(path: Path, flags: int, *, remedy: str, private: bool = False) -> int:
    """Open a regular file that no other user can have put there or can change; its descriptor.

    A new one (O_CREAT) has mode 0600. Raises `StateError` with ``remedy``, `ConfigError` for a
    ``private`` one that others may read, `OSError` as `os.open`.
    """
    place = _resolved(path, remedy)
    # Without O_NONBLOCK a planted pipe would hold us here.
    handle = os.open(place, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise StateError(f"{place} is no regular file; {remedy}")
        _check_owner(place, found, path, remedy)
        if private and (mode := stat.S_IMODE(found.st_mode)) & 0o077:
            raise ConfigError(f"{path} has mode {mode:o}; others may read it: chmod 600 it")
        _check(place, found, path, remedy)
    except BaseException:
        os.close(handle)
        raise
    return handle


def read_own(path: Path, *, remedy: str, private: bool = False) -> bytes:
    """The content of a file as `open_own` opens it."""
    with os.fdopen(open_own(path, os.O_RDONLY, remedy=remedy, private=private), "rb") as file:
        return file.read()


def _resolved(path: Path, remedy: str) -> Path:
    """Follow links part by part, looking at all but the last, which need not be there."""
    way = Path("/")
    _check(way, way.lstat(), path, remedy)
    left = [*reversed(path.absolute().parts[1:])]
    links = 0
    while left:
        part = left.pop()
        if part == "..":
            way = way.parent
            continue
        place = way / part
        try:
            found = place.lstat()
        except FileNotFoundError:
            if left:
                raise
            return place
        if stat.S_ISLNK(found.st_mode):
            _check_owner(place, found, path, remedy)
            links += 1
            if links > _MOST_LINKS:
                raise StateError(f"{path} goes through more than {_MOST_LINKS} links; {remedy}")
            target = Path(os.readlink(place))
            left += reversed(target.parts[1:] if target.is_absolute() else target.parts)
            way = Path("/") if target.is_absolute() else way
            continue
        if left:
            _check(place, found, path, remedy)
        way = place
    return way


def _check(place: Path, found: os.stat_result, path: Path, remedy: str) -> None:
    _check_owner(place, found, path, remedy)
    shared = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if found.st_mode & stat.S_IWGRP and _private_group(found):
        shared &= ~stat.S_IWGRP
    if shared and not (stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX):
        raise StateError(
            f"{place} has mode {stat.S_IMODE(found.st_mode):o}: other users could swap "
            f"{_named(path, place)}; chmod go-w {place}, or {remedy}"
        )


def _check_owner(place: Path, found: os.stat_result, path: Path, remedy: str) -> None:
    if found.st_uid not in (0, os.geteuid()):
        raise StateError(
            f"{place} belongs to {_user(found.st_uid)}, who could swap {_named(path, place)}; "
            f"this is {_user(os.geteuid())}: {remedy}"
        )


def _named(path: Path, place: Path) -> str:
    return "it" if place == path else str(path)


def _user(number: int) -> str:
    try:
        return f"user {pwd.getpwuid(number).pw_name} ({number})"
    except KeyError:
        return f"user {number}"


def _private_group(found: os.stat_result) -> bool:
    """Whether the group is its owner's own, with nobody else in it."""
    try:
        owner, group = pwd.getpwuid(found.st_uid), grp.getgrgid(found.st_gid)
    except KeyError:
        return False
    alone = set(group.gr_mem) <= {owner.pw_name}
    return owner.pw_gid == found.st_gid and owner.pw_name == group.gr_name and alone

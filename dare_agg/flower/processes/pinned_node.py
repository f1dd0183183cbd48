"""A SuperNode that runs one app only: the party's own copy.

Flower sends the app's code to every SuperNode with the run, so whoever can start a run could
send code that reads a party's keys, model and data. Here the SuperNode compares each bundle
(FAB) with the one it builds from a folder of the party's own, file by file, and answers any
other with Flower's "the FAB could not be verified". With a Flower whose SuperNode was not looked
at it refuses to start.
"""

from __future__ import annotations

import hashlib
import io
import logging
import zipfile
from collections.abc import Sequence
from pathlib import Path

from dare_agg.errors import ConfigError
from dare_agg.flower.internals import app_bundle, guard_bundles, run_program

LOG = logging.getLogger("flwr")


def bundle_files(bundle: bytes) -> dict[str, str]:
    """SHA-256 (hex) of every file of a bundle. Raises `ValueError` where a name comes twice."""
    with zipfile.ZipFile(io.BytesIO(bundle)) as archive:
        names = archive.namelist()
        if len(set(names)) != len(names):
            raise ValueError("a file comes twice")
        return {name: hashlib.sha256(archive.read(name)).hexdigest() for name in names}


def own_bundle(app: Path) -> dict[str, str]:
    """The files of the bundle that the app in this folder makes. Raises `ConfigError`."""
    try:
        return bundle_files(app_bundle(app))
    except (OSError, ValueError, KeyError) as error:
        why = " ".join(str(error).split())
        raise ConfigError(f"{app} makes no Flower app bundle: {why}") from error


def differences(theirs: bytes, ours: dict[str, str]) -> str:
    """Say how a bundle differs from ours; "" where it does not."""
    try:
        found = bundle_files(theirs)
    except (ValueError, zipfile.BadZipFile, NotImplementedError) as error:
        return f"it cannot be read: {error}"
    names = sorted(name for name in {*found, *ours} if found.get(name) != ours.get(name))
    more = f" and {len(names) - 3} more files" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more} differ" if names else ""


def pin(ours: dict[str, str]) -> None:
    """Let this process's SuperNode take bundles of exactly these files and no others."""

    def accept(bundle: bytes) -> bool:
        why = differences(bundle, ours)
        if why:
            LOG.error("the run's app is not this party's own: %s; it is not run", why)
        return not why

    guard_bundles(accept)


def run_pinned(app: Path, arguments: Sequence[str]) -> None:
    """Run ``flower-supernode`` with these arguments, pinned to the app of a folder."""
    ours = own_bundle(app)
    pin(ours)
    LOG.info("this SuperNode runs the app of %s alone (%d files)", app, len(ours))
    run_program("flower-supernode", arguments)

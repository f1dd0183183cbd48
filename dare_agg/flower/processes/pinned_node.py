"""A SuperNode that runs one app only: the party's own copy.

Flower sends the app's code to every SuperNode with the run, so whoever can start a run could
send code that reads a party's keys, model and data. Here the SuperNode compares each bundle
(FAB) with the one it builds from a folder of the party's own, file by file, and answers any
other with Flower's "the FAB could not be verified", also where a run gives it another name or
version: by these Flower finds the folder that it runs. With a Flower whose SuperNode was not looked
at it refuses to start.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import tempfile
import tomllib
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dare_agg.errors import ConfigError
from dare_agg.flower.internals import app_bundle, guard_bundles, guard_errors
from dare_agg.flower.secure.gate import KEPT_HERE, TURNED_AWAY
from dare_agg.flower.supernode import run_supernode
from dare_agg.rounds.messages import one_line

LOG = logging.getLogger("flwr")
_OTHER = ("", -1)
NOT_VERIFIED = "The FAB could not be verified."


@dataclass(frozen=True)
class OwnApp:
    """The app that a party runs: its name ("publisher/project") and version, and SHA-256 (hex)
    and size of every file of its bundle."""

    name: str
    version: str
    files: Mapping[str, tuple[str, int]]


def own_bundle(app: Path) -> OwnApp:
    """The bundle that the app in this folder makes. Raises `ConfigError`."""
    try:
        with zipfile.ZipFile(io.BytesIO(app_bundle(app))) as archive:
            contents = {name: archive.read(name) for name in archive.namelist()}
        project = tomllib.loads(contents["pyproject.toml"].decode())
        return OwnApp(
            f"{project['tool']['flwr']['app']['publisher']}/{project['project']['name']}",
            str(project["project"]["version"]),
            {name: (_digest(data), len(data)) for name, data in contents.items()},
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = " ".join(str(error).split())
        raise ConfigError(f"{app} makes no Flower app bundle: {why}") from error


def differences(theirs: bytes, ours: OwnApp) -> str:
    """Say how a bundle differs from ours; "" where it does not.

    No more is unpacked than ours has, whatever the bundle holds.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(theirs)) as archive:
            files = archive.infolist()
            if len({file.filename for file in files}) != len(files):
                return "a file comes twice"
            found = {}
            for file in files:
                due = ours.files.get(file.filename)
                same = due is not None and file.file_size == due[1]
                content = (_digest(archive.read(file)), file.file_size) if same else _OTHER
                found[file.filename] = content
    except Exception as error:  # broken in whatever way: it is not ours
        return f"it cannot be read: {error}"
    names = sorted(n for n in {*found, *ours.files} if found.get(n) != ours.files.get(n))
    more = f" and {len(names) - 3} more files" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more} differ" if names else ""


def pin(ours: OwnApp) -> None:
    """Let this process's SuperNode take bundles of exactly these files, under their own name and
    version: Flower looks for an app's folder by what the SuperLink says of them."""

    def accept(bundle: bytes, name: str, version: str) -> bool:
        why = differences(bundle, ours)
        if not why and (name, version) != (ours.name, ours.version):
            why = f"it is run as {one_line(name)!r}, version {one_line(version)!r}"
        if why:
            LOG.error("the run's app is not this party's own: %s; it is not run", one_line(why))
        return not why

    guard_bundles(accept)


def run_pinned(app: Path, arguments: Sequence[str]) -> None:
    """Run ``flower-supernode`` with these arguments, pinned to the app of a folder.

    It waits as shortly as `dare_agg.flower.supernode`.

    Apps are unpacked into a folder of this process's own: Flower takes what lies under an app's
    name for the app, and other runs' or users' would lie there too.
    """
    ours = own_bundle(app)
    pin(ours)
    guard_errors((TURNED_AWAY, KEPT_HERE, NOT_VERIFIED), KEPT_HERE)
    LOG.info("this SuperNode runs the app of %s alone (%d files)", app, len(ours.files))
    with tempfile.TemporaryDirectory(prefix="dare-agg-apps-") as folder:
        os.environ["FLWR_HOME"] = folder
        run_supernode(arguments)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()

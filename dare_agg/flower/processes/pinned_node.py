"""A SuperNode that runs one app only: the party's own copy.

Flower sends the app's code to every SuperNode with the run, so whoever can start a run could
send code that reads a party's keys, model and data. Here the SuperNode compares each bundle
(FAB) with the one it builds from a folder of the party's own, file by file, and answers any
other with Flower's "the FAB could not be verified". Made for Flower 1.41; with another version
whose SuperNode has changed it refuses to start.
"""

from __future__ import annotations

import hashlib
import io
import logging
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.cli.build import build_fab_from_disk
from flwr.supernode import start_client_internal as supernode
from flwr.supernode.cli import flower_supernode

from dare_agg.errors import ConfigError

LOG = logging.getLogger("flwr")
_PARTS = ("_pull_and_store_message", "_verify_fab", "get_fused_config_from_fab")
# What the patched SuperNode hands its own check, which asks for these where Flower's hub signs.
_PIN = "pinned"


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
        return bundle_files(build_fab_from_disk(app))
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
    missing = [name for name in _PARTS if not callable(getattr(supernode, name, None))]
    if missing:
        raise ConfigError(
            f"this Flower's SuperNode has no {missing[0]}; install flwr 1.41 to pin an app"
        )
    pull = supernode._pull_and_store_message

    def verified(fab: Any, trusted_entities: dict[str, str]) -> bool:
        why = differences(fab.content, ours)
        if why:
            LOG.error("the run's app is not this party's own: %s; it is not run", why)
        return not why

    def pinned_pull(**words: Any) -> int | None:
        fetch: Callable[[str, int], Any] = words["get_fab"]

        def get_fab(fab_hash: str, run_id: int) -> Any:
            return replace(fetch(fab_hash, run_id), verifications={"valid_license": _PIN})

        return pull(**{**words, "get_fab": get_fab, "trusted_entities": {_PIN: _PIN}})

    supernode._verify_fab = verified
    supernode._pull_and_store_message = pinned_pull  # type: ignore[assignment]


def run_pinned(app: Path, arguments: Sequence[str]) -> None:
    """Run ``flower-supernode`` with these arguments, pinned to the app of a folder."""
    ours = own_bundle(app)
    pin(ours)
    LOG.info("this SuperNode runs the app of %s alone (%d files)", app, len(ours))
    sys.argv = ["flower-supernode", *arguments]
    flower_supernode()

"""Where a model lies: a path, a hub's name, or a folder of the hub's cache.

A path that exists is always meant as such. A name ``OWNER/NAME[@REVISION]`` is looked for in
Hugging Face's cache (``HF_HUB_CACHE``, ``HF_HOME``), as ``models--OWNER--NAME/snapshots/COMMIT``,
where ``refs/REVISION`` holds the commit; what is not there is downloaded.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from dare_agg.checkpoint.hub_download import download
from dare_agg.checkpoint.hub_names import CACHED, MAIN, HubName, hub_name, missing_path, shown_name
from dare_agg.checkpoint.quantised import QuantisedError
from dare_agg.checkpoint.weight_files import PICKLES, weight_files
from dare_agg.errors import CheckpointError

_COMMIT = re.compile(r"[0-9a-f]{7,64}", re.ASCII)
_MOST_REFERENCE = 256


def located_all(given: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Return what `located` does for each; a path that does not exist ends it before a download."""
    for path in given:
        if hub_name(path) is None and not Path(path).exists():
            raise missing_path(path)
    return [located(path) for path in given]


def located(given: str | os.PathLike[str]) -> Path:
    """Return the file or folder of a model: a path, or a hub's name, downloaded where needed.

    Raises `CheckpointError` for a model that is in no cache and cannot be had.
    """
    path = Path(given)
    if path.is_dir():
        return _snapshot_of(path) if path.name.startswith(CACHED) else path
    name = hub_name(given)
    if name is None:
        return path
    cached = _cached(name)
    if cached is not None and _has_weights(cached):
        return cached
    return download(name, cached, cache_place())


def in_cache(given: str | os.PathLike[str]) -> Path | None:
    """Return what the hub's cache has of a name; None for a path and for what it lacks."""
    name = hub_name(given)
    return _cached(name) if name is not None else None


def cache_place() -> Path:
    """The folder in which Hugging Face's tools keep what they download."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or os.path.join(home, "huggingface")
    place = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    return Path(os.path.expanduser(os.path.expandvars(place or os.path.join(home, "hub"))))


def _cached(name: HubName) -> Path | None:
    """The snapshot of a name in the cache, None where it has none."""
    folder = cache_place() / (CACHED + name.repository.replace("/", "--"))
    snapshots = folder / "snapshots"
    commit = _reference(folder, name.revision)
    if commit is not None and (snapshots / commit).is_dir():
        return snapshots / commit
    if _COMMIT.fullmatch(name.revision) and snapshots.is_dir():
        found = [path for path in snapshots.iterdir() if path.name.startswith(name.revision)]
        if len(found) == 1:
            return found[0]
    return None


def _reference(folder: Path, revision: str) -> str | None:
    try:
        with (folder / "refs" / revision).open(encoding="ascii") as file:
            commit = file.read(_MOST_REFERENCE).strip()
    except (OSError, ValueError):
        return None
    return commit if _COMMIT.fullmatch(commit) else None


def _snapshot_of(folder: Path) -> Path:
    """The snapshot of a cache folder that is given itself: main's, or the only one.

    A folder without snapshots is a folder like others. Raises `CheckpointError` where there are
    several, none of them main's.
    """
    snapshots = folder / "snapshots"
    if not snapshots.is_dir():
        return folder
    main = _reference(folder, MAIN)
    if main is not None and (snapshots / main).is_dir():
        return snapshots / main
    found = sorted(path for path in snapshots.iterdir() if path.is_dir())
    if len(found) == 1:
        return found[0]
    if not found:
        raise CheckpointError(
            f"{folder} of the hub's cache has no snapshot: its download was not finished; download "
            f"it again: hf download {shown_name(folder)}"
        )
    raise CheckpointError(
        f"{folder} of the hub's cache has {len(found)} snapshots, none of which is main's; give "
        f"one, such as {found[0]}"
    )


def _has_weights(folder: Path) -> bool:
    """Whether a snapshot is whole: a cache may hold a tokenizer alone, or some of the shards."""
    if (folder / "adapter_model.safetensors").is_file():
        return True
    try:
        weight_files(folder)
    except QuantisedError:
        return True
    except (CheckpointError, OSError):
        # A hub that has pickles alone has no more to give: opening it says so.
        return any(path.suffix in PICKLES for path in folder.iterdir() if path.is_file())
    return True

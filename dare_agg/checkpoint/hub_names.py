"""How a model on a hub is named: ``OWNER/NAME[@REVISION]``, its page's address, a cache folder."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from dare_agg.errors import CheckpointError

_PART = r"[A-Za-z0-9_][\w.-]{0,95}"
_NAME = re.compile(rf"({_PART})/({_PART})(?:@([\w.][\w./+-]{{0,199}}))?", re.ASCII)
# What is copied from a browser; a path has lost one of the slashes.
_ADDRESS = re.compile(r"https?:/+(?:huggingface\.co|hf\.co)/([^/]+/[^/]+?)(?:/tree/([^?#]+?))?/?")
# Names of files, which no model has.
_FILES = re.compile(
    r".*\.(safetensors|dare|gguf|bin|pth?|ckpt|json|ya?ml|toml|csv|zip)", re.ASCII | re.IGNORECASE
)
# How the hub's cache calls a model's folder.
CACHED = "models--"
MAIN = "main"


class HubName(NamedTuple):
    """A model's name on a hub, and the branch, tag or commit that is meant."""

    repository: str
    revision: str = MAIN

    def __str__(self) -> str:
        at = "" if self.revision == MAIN else f"@{self.revision}"
        return f"{self.repository}{at}"


def hub_name(given: str | os.PathLike[str], root: Path | None = None) -> HubName | None:
    """Read a word as a hub's name; None for a path, that exists below ``root`` or cannot be a name.

    In a folder that exists a missing name is a missing file: it is not asked for elsewhere.
    """
    word = os.fspath(given)
    root = root or Path()
    if os.path.lexists(root / word):
        return None
    if address := _ADDRESS.fullmatch(word):
        word = "@".join(part for part in address.groups() if part)
    found = _NAME.fullmatch(word)
    if found is None or ".." in word or _FILES.fullmatch(word):
        return None
    if (root / found[1]).is_dir():
        return None
    return HubName(f"{found[1]}/{found[2]}", found[3] or MAIN)


def missing_path(path: str | os.PathLike[str]) -> CheckpointError:
    """The error for a model's path that does not exist."""
    return CheckpointError(
        f"{os.fspath(path)} does not exist; give a .safetensors file, a model folder, or the name "
        "of a model on the hub as OWNER/NAME"
    )


def shown_name(given: str | os.PathLike[str]) -> str:
    """How a model is called for people: a hub's name, or a path's last part."""
    name = hub_name(given)
    if name is not None:
        return name.repository
    for part in Path(given).parts:
        if part.startswith(CACHED) and part.count("--") > 1:
            return part.removeprefix(CACHED).replace("--", "/", 1)
    return Path(given).name

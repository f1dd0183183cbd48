"""Models that come in another form than a Hugging Face folder, turned into one.

GGUF files are dequantised (to float32) and ZIP archives unpacked, once, into the cache folder;
several files that hold one archive in parts are joined first.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from dare_agg.errors import ConfigError
from dare_agg.files.cache import cache_folder
from dare_agg.files.trust import own_folder
from dare_agg.offline.gguf import folder_from_gguf

LOG = logging.getLogger("flwr")
SUFFIXES = (".gguf", ".zip")
_KEPT = (".json", ".txt", ".model", ".safetensors", ".jinja")
_CHUNK = 1 << 22


def unpacked_folder(name: str, sha256: str) -> Path:
    """Where the folder of a model of this name and file digest is kept."""
    return cache_folder("models") / f"{name}-{sha256[:8]}"


def unpack(name: str, parts: Sequence[Path], sha256: str, suffix: str, remedy: str) -> Path:
    """Return the folder made of a model's file (its parts joined); makes it where it is missing.

    ``sha256`` begins the file's digest; ``remedy`` says how to get the right file. Raises
    `ConfigError` where the file is another one or cannot be turned into a folder, `StateError`
    where another user could put a model into the cache folder.
    """
    target = unpacked_folder(name, sha256)
    own_folder(target.parent, remedy="set DARE_AGG_CACHE to a folder of this user's own")
    if target.is_dir():
        return target
    LOG.info("unpacking model %s, once; its folder is kept", name)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as temporary:
        draft = Path(temporary)
        joined = parts[0] if len(parts) == 1 else draft / f"joined{suffix}"
        found = _join(parts, None if len(parts) == 1 else joined)
        if not found.startswith(sha256):
            raise ConfigError(f"model {name!r} has SHA-256 {found[:12]}, not {sha256}…; {remedy}")
        made = draft / "model"
        made.mkdir()
        (folder_from_gguf if suffix == ".gguf" else _from_zip)(joined, made)
        with contextlib.suppress(OSError):  # another process was first: its folder serves
            made.replace(target)
    return target


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    return _join((path,), None)


def _join(parts: Sequence[Path], out: Path | None) -> str:
    """Write parts one after another (where ``out`` is given); returns SHA-256 of the whole."""
    digest = hashlib.sha256()
    with contextlib.ExitStack() as stack:
        written = stack.enter_context(out.open("wb")) if out else None
        for part in parts:
            with part.open("rb") as file:
                while block := file.read(_CHUNK):
                    digest.update(block)
                    if written:
                        written.write(block)
    return digest.hexdigest()


def _from_zip(archive: Path, folder: Path) -> None:
    """Unpack the folder of the archive that holds config.json; files directly in it only."""
    with zipfile.ZipFile(archive) as opened:
        names = opened.namelist()
        root = min((n for n in names if n.rpartition("/")[2] == "config.json"), key=len, default="")
        if not root:
            raise ConfigError(f"{archive.name} holds no config.json; it is no Hugging Face model")
        inside = root.removesuffix("config.json")
        for name in names:
            own = name.removeprefix(inside)
            if name.startswith(inside) and own and "/" not in own and own.endswith(_KEPT):
                with opened.open(name) as source, (folder / own).open("wb") as target:
                    shutil.copyfileobj(source, target, _CHUNK)

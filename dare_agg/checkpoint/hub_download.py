"""Downloading a model from a hub: its safetensors, JSON and tokenizer files, no other."""

from __future__ import annotations

import glob
import os
import re
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from dare_agg.checkpoint.carried import CARD, may_be_carried
from dare_agg.checkpoint.hub_names import MAIN, HubName
from dare_agg.checkpoint.reader import INDEX_NAME, WEIGHTS_NAME
from dare_agg.errors import CheckpointError

_SHARD = re.compile(r"model-\d{5,6}-of-\d{5,6}\.safetensors", re.ASCII)
_ADAPTER = ("adapter_model.safetensors", "adapter_config.json")
_OFF = {"1", "TRUE", "YES", "ON"}
_SECONDS = 20.0


def download(name: HubName, cached: Path | None, place: Path) -> Path:
    """Download a model into the hub's cache ``place``; returns its snapshot there.

    ``cached`` is a snapshot that lacks weights. Raises `CheckpointError` with the command that
    fetches the model where a hub can be reached, if none can be from here.
    """
    revision = "" if name.revision == MAIN else f" --revision {name.revision}"
    there = "has it without its weights" if cached else "has no such model"
    missing = f"{name} is no file or folder here, and the hub's cache {place} {there}"
    remedy = f"hf download {name.repository}{revision}"
    elsewhere = f"where a hub can be reached, download it: {remedy}"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in _OFF:
        raise CheckpointError(f"{missing}; HF_HUB_OFFLINE is set: {elsewhere}")
    try:
        import huggingface_hub
        from huggingface_hub import errors
        from huggingface_hub.utils import disable_progress_bars
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"{missing}; to download it: pip install huggingface_hub, or {elsewhere}"
        ) from error
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        api = huggingface_hub.HfApi()
        info = api.model_info(name.repository, revision=name.revision, timeout=_SECONDS)
        files = wanted_files([file.rfilename for file in info.siblings or ()])
        if not files:
            raise CheckpointError(
                f"{name} has no safetensors on the hub; load it with transformers' from_pretrained "
                "and save it with save_pretrained"
            )
        folder = huggingface_hub.snapshot_download(
            name.repository,
            revision=name.revision,
            cache_dir=place,
            allow_patterns=[glob.escape(file) for file in files],
        )
    except CheckpointError:
        raise
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{name} is gated: ask for access on its page, then: hf auth login"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{missing}, nor has the hub, or it is private; correct the name, or: hf auth login"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(
            f"{name.repository} has no revision {name.revision!r} on the hub; correct it, or leave "
            "it out"
        ) from error
    except Exception as error:  # of httpx, of the disk: whatever keeps it from being had
        why = f"{type(error).__name__}: {_line(error)}"
        raise CheckpointError(
            f"{missing}; the hub cannot be reached ({why}): {elsewhere}"
        ) from error
    return Path(folder)


def wanted_files(files: Collection[str]) -> list[str]:
    """Which of a repository's files belong to the model; none where it has no safetensors."""
    weights = [
        file
        for file in files
        if file in (WEIGHTS_NAME, INDEX_NAME, *_ADAPTER) or _SHARD.fullmatch(file)
    ]
    if not any(file.endswith(".safetensors") for file in weights):
        weights = [file for file in files if file.endswith(".safetensors") and "/" not in file]
    if not weights:
        return []
    return sorted({*weights, *(f for f in files if f != CARD and may_be_carried(f))})


def _line(error: Any) -> str:
    return " ".join(str(error).split())[:160]

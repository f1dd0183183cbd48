"""What a model's folder says of itself in config.json."""

from __future__ import annotations

from typing import Any

from dare_agg.checkpoint.reader import Checkpoint
from dare_agg.files.json_text import read_settings


def config_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """The folder's config.json, with a language model's inside it on top; {} for none."""
    if checkpoint.folder is None:
        return {}
    config = read_settings(checkpoint.folder / "config.json")
    inner = config.get("text_config")
    return {**config, **(inner if isinstance(inner, dict) else {})}

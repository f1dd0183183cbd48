"""What the server would refuse, asked before it is started: ``[tool.dare-agg]`` names these."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dare_agg.checkpoint.hub_names import hub_name, missing_path
from dare_agg.errors import ConfigError
from dare_agg.offline.adapters.folder import is_adapter
from server.config import DEFAULTS
from server.reading import read_config
from server.resumed import check_resumed


def check(raw: Mapping[str, Any]) -> None:
    """Refuse what the server would, before it is started; see ``[tool.dare-agg]``."""
    config = read_config(raw)
    if config.resume:
        check_resumed(config, Path(config.output))


def check_here(raw: Mapping[str, Any]) -> None:
    """Refuse files that the server is to read and that are not on this machine."""
    for key in ("initial", "identities"):
        word = str(raw.get(key, DEFAULTS[key]))
        if word and not Path(word).is_file() and not (key == "initial" and is_adapter(Path(word))):
            raise ConfigError(f"{key}: the file {word!r} does not exist; check the path")
    base = str(raw.get("base", DEFAULTS["base"]))
    if base and hub_name(base) is None and not Path(base).exists():
        raise missing_path(base)

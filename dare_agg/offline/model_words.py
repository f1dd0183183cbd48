"""How a model is written: a path or a hub's name, alone or with an adapter, ``MODEL+ADAPTER``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from dare_agg.checkpoint.hub_names import hub_name
from dare_agg.errors import ConfigError


def model_words(given: str | os.PathLike[str], root: Path | None = None) -> dict[str, Any]:
    """Read a model's word as the keys ``path`` and, where it has one, ``adapter``.

    A path that exists below ``root`` is meant as such, whatever is in its name. Of several signs
    the one counts that has most models beside it.
    """
    word, root = os.fspath(given), root or Path()
    if os.path.lexists(root / word):
        return {"path": word}
    signs = [at for at, letter in enumerate(word) if letter == "+" and 0 < at < len(word) - 1]
    ways = [(word[:at], word[at + 1 :]) for at in signs]
    known = [sum(_is_model(part, root) for part in way) for way in ways]
    if not any(known) or (max(known) == 1 and hub_name(word, root)):
        return {"path": word}
    path, adapter = ways[known.index(max(known))]
    return {"path": path, "adapter": adapter}


def base_word(given: str | os.PathLike[str], root: Path | None = None) -> str:
    """Read BASE's word; raises `ConfigError` where it has an adapter."""
    words = model_words(given, root)
    if "adapter" in words:
        raise ConfigError(
            f"BASE is given with an adapter, {os.fspath(given)}; make a model of the two first and "
            f"give that: dare-agg merge {words['path']} {words['adapter']} -o MODEL"
        )
    return str(words["path"])


def _is_model(word: str, root: Path) -> bool:
    return os.path.lexists(root / word) or hub_name(word, root) is not None

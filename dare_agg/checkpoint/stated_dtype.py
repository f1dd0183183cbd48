"""The dtype that a model's ``config.json`` states: what its tensors have.

Loaders (transformers' ``dtype="auto"``, vLLM, TGI) convert all tensors to what it says, so a
merge written in another dtype than its base's would be rounded again, or take twice the memory.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from dare_agg.checkpoint.reader import DTYPE_WORDS
from dare_agg.files.json_text import read_json

CONFIG = "config.json"
_KEYS = ("dtype", "torch_dtype")
_WORDS = {code: word for word, code in DTYPE_WORDS.items()} | {"F64": "float64"}
_STATED = re.compile(r"(torch\.)?(float(16|32|64)|bfloat16|half|float|double)", re.ASCII)
# The tensors that a part of a configuration speaks of have one of these in a segment.
_PARTS = {
    "text": ("text", "language", "llm"), "vision": ("vision", "visual", "image"),
    "audio": ("audio", "speech"),
}  # fmt: skip


class Planned(Protocol):
    """What of a tensor is looked at."""

    @property
    def dtype(self) -> str:
        """In safetensors' words."""

    @property
    def size(self) -> int:
        """Number of elements."""


def state_dtype(folder: Path, tensors: Mapping[str, Planned]) -> None:
    """Make ``config.json`` of a folder say which dtype its tensors have.

    Where the tensors have several, it is that of most elements, for a part (``text_config``)
    of that part's own. Only what is stated already is changed; a file that cannot be read stays
    as it is.
    """
    file = folder / CONFIG
    try:
        config = read_json(file)
    except (OSError, ValueError):
        return
    if isinstance(config, dict) and _stated(config, tensors):
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        file.write_text(text, encoding="utf-8")


def _stated(config: dict[str, Any], tensors: Mapping[str, Planned]) -> bool:
    """Correct a configuration and its parts in place; returns whether anything changed."""
    word = _most(tensors)
    changed = False
    for key, value in config.items():
        if isinstance(value, dict):
            part = key.removesuffix("_config")
            changed |= _stated(value, _of_part(part, tensors))
        elif key in _KEYS and word and _is_dtype(value) and value.removeprefix("torch.") != word:
            config[key] = word
            changed = True
    return changed


def _is_dtype(value: Any) -> bool:
    return isinstance(value, str) and _STATED.fullmatch(value) is not None


def _most(tensors: Mapping[str, Planned]) -> str | None:
    found: Counter[str] = Counter()
    for tensor in tensors.values():
        if tensor.dtype in _WORDS:
            found[_WORDS[tensor.dtype]] += tensor.size
    return found.most_common(1)[0][0] if found else None


def _of_part(part: str, tensors: Mapping[str, Planned]) -> Mapping[str, Planned]:
    """The tensors that a part's name is found in; all where it is found in none."""
    words = _PARTS.get(part, (part,))
    found = {n: t for n, t in tensors.items() if any(word in n.lower() for word in words)}
    return found or tensors

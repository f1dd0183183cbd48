"""Tensors that stand in a model's file beside the model: a classifier's head and what guards it.

A run's export loads as a classifier, so its file holds the head, too. To whoever compares, merges
or describes models it is none of the body's: such tensors are named in the file's metadata, and
what they replaced is kept under another name.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from dare_agg.files.json_text import parse_json

KEY = "dare-agg.beside"
# What a tensor becomes whose name one of these takes.
UNUSED = "unused."
_MOST = 256


def beside_words(names: Iterable[str]) -> dict[str, str]:
    """The metadata of a file that holds such tensors."""
    return {KEY: json.dumps(sorted(names))}


def beside_in(metadata: Mapping[str, str]) -> frozenset[str]:
    """Their names; empty for a file without any, or with words that are none."""
    try:
        names = parse_json(metadata.get(KEY, "[]"))
    except ValueError:
        return frozenset()
    good = isinstance(names, list) and len(names) <= _MOST
    return frozenset(n for n in names if isinstance(n, str)) if good else frozenset()


def body_of(tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> dict[str, Any]:
    """The model's own tensors by their own names.

    >>> body_of({"w": 1, "unused.p": 2, "p": 3}, beside_words(["p"]))
    {'w': 1, 'p': 2}
    """
    beside = beside_in(metadata)
    if not beside:
        return dict(tensors)
    found = {}
    for name, value in tensors.items():
        own = name.removeprefix(UNUSED)
        if own != name and own in beside:
            found[own] = value
        elif name not in beside:
            found[name] = value
    return found

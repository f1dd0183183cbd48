"""Tensors added to the weights that a model folder already holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from dare_agg.checkpoint.beside import UNUSED, beside_words
from dare_agg.checkpoint.reader import INDEX_NAME, WEIGHTS_NAME
from dare_agg.errors import CheckpointError
from dare_agg.files.atomic import replace_file
from dare_agg.files.json_text import read_json
from dare_agg.files.safetensors_header import header_length, parse_header

_MORE = "classifier.safetensors"


def add_tensors(folder: Path, more: Mapping[str, NDArray[Any]]) -> None:
    """Add float32 tensors to a folder's weights; what had such a name is kept as ``unused.…``.

    The bytes of all others stay as they are, whatever their type. In a folder of shards they are
    a shard of their own. Raises `CheckpointError` for a folder without safetensors, and where a
    shard has a tensor of the same name.
    """
    more = {name: np.ascontiguousarray(array, np.float32) for name, array in more.items()}
    whole, index = folder / WEIGHTS_NAME, folder / INDEX_NAME
    if whole.is_file():
        _rewrite(whole, more)
    elif index.is_file():
        stated = read_json(index)
        places = dict(stated["weight_map"])
        if twice := sorted(set(places) & set(more)):
            raise CheckpointError(f"{index} has {twice[0]!r} already; merge its shards into one")
        save_file(more, folder / _MORE, {"format": "pt", **beside_words(more)})
        stated["weight_map"] = places | dict.fromkeys(more, _MORE)
        replace_file(index, ((json.dumps(stated, indent=2) + "\n").encode(),))
    else:
        raise CheckpointError(f"{folder} has no {WEIGHTS_NAME}; give a model in safetensors")


def _rewrite(file: Path, more: Mapping[str, NDArray[Any]]) -> None:
    raw = file.read_bytes()
    length = header_length(raw[:8], len(raw))
    places, metadata = parse_header(raw[8 : 8 + length], len(raw) - 8 - length)
    body = memoryview(raw)[8 + length :]
    words = {"format": "pt", **metadata, **beside_words(more)}
    header: dict[str, Any] = {"__metadata__": words}
    parts: list[Any] = []
    at = 0
    for name, place in sorted(places.items(), key=lambda pair: pair[1].start):
        piece = body[place.start : place.stop]
        name = UNUSED + name if name in more else name
        header[name] = _entry(place.dtype, place.shape, at, len(piece))
        parts.append(piece)
        at += len(piece)
    for name, array in more.items():
        header[name] = _entry("F32", array.shape, at, array.nbytes)
        parts.append(array.astype("<f4", copy=False).tobytes())
        at += array.nbytes
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    replace_file(file, (len(text).to_bytes(8, "little"), text, *parts))


def _entry(dtype: str, shape: tuple[int, ...], at: int, size: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}

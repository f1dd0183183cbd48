"""Opening a model on disk: a safetensors file, or a folder with one or with shards.

What is no model, or no whole one, is named as what it is: pickled weights, quantised ones.
"""

from __future__ import annotations

import os
from pathlib import Path

from dare_agg.checkpoint.quantised import (
    GGUF_SUFFIX,
    QuantisedError,
    check_declared,
    check_not_quantised,
    gguf_refusal,
)
from dare_agg.checkpoint.reader import _SUFFIX, INDEX_NAME, WEIGHTS_NAME, Checkpoint, TensorInfo
from dare_agg.errors import CheckpointError, FormatError
from dare_agg.files.json_text import parse_json, read_bounded
from dare_agg.files.safetensors_header import header_length, parse_header
from dare_agg.vectors.layout import MAX_TENSORS, bad_name

# An index names each tensor and its shard; the largest known has 14 MB.
_MOST_INDEX_BYTES = 24 << 20


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a ``.safetensors`` file or a Hugging Face folder (sharded or not).

    Raises `CheckpointError` for a missing path, pickled weights or a malformed file, and
    `QuantisedError`, one of those, where the weights are codes.
    """
    where = Path(path)
    try:
        checkpoint = open_tensors(where)
    except CheckpointError:
        # It may have no tensors that are read because it is quantised: say that instead.
        check_declared(where)
        raise
    check_not_quantised(where, checkpoint.tensors)
    return checkpoint


def refuse_quantised(where: Path) -> None:
    """Raise `QuantisedError` where a model's weights are codes; other problems pass.

    For a model that somebody else is going to load.
    """
    try:
        tensors = open_tensors(where).tensors
    except QuantisedError:
        raise
    except CheckpointError:
        check_declared(where)
        return
    check_not_quantised(where, tensors)


def open_tensors(where: Path) -> Checkpoint:
    """Open a model as `open_checkpoint` does, codes of a quantiser too."""
    if where.is_file():
        if where.suffix == GGUF_SUFFIX:
            raise gguf_refusal(where)
        if where.suffix != _SUFFIX:
            raise CheckpointError(
                f"{where} is no {_SUFFIX} file; save the model with safe serialization first"
            )
        tensors, metadata = _read_header(where)
        return Checkpoint(where, tensors, metadata)
    if not where.is_dir():
        raise CheckpointError(f"{where} does not exist; give a {_SUFFIX} file or a model folder")
    if (where / INDEX_NAME).is_file():
        return _open_sharded(where)
    if (where / WEIGHTS_NAME).is_file():
        tensors, metadata = _read_header(where / WEIGHTS_NAME)
        return Checkpoint(where, tensors, metadata)
    gguf = sorted(where.glob(f"*{GGUF_SUFFIX}"))
    if gguf:
        raise gguf_refusal(gguf[0])
    others = sorted(p.name for p in where.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if others:
        raise CheckpointError(
            f"{where} has only pickled weights ({others[0]}), which are not read: pickle runs "
            "code; save the model again with save_pretrained"
        )
    raise CheckpointError(f"{where} has no {WEIGHTS_NAME}; give a model folder or a file")


def _open_sharded(folder: Path) -> Checkpoint:
    try:
        index = read_bounded(folder / INDEX_NAME, _MOST_INDEX_BYTES)
        # A tensor costs 2.
        index = parse_json(index, most=_MOST_INDEX_BYTES, cost=3 * MAX_TENSORS)
        weight_map = index["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / INDEX_NAME} is no index: {error}") from error
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(f"{folder / INDEX_NAME} names shard {shard!r} outside its folder")
        if not os.path.isfile(folder / shard):  # which takes names of any length
            raise CheckpointError(f"{folder}: shard {shard} of the index is missing; copy it")
        found, extra = _read_header(folder / shard)
        metadata.update(extra)
        for name, info in found.items():
            if weight_map.get(name) == shard:
                tensors[name] = info
    missing = sorted(set(weight_map) - set(tensors))
    if missing:
        raise CheckpointError(f"{folder}: tensor {missing[0]!r} of the index is in no shard")
    return Checkpoint(folder, dict(sorted(tensors.items())), metadata)


def _read_header(file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Read and check a safetensors header: every byte of the file belongs to one tensor."""
    total = file.stat().st_size
    try:
        with file.open("rb") as stream:
            length = header_length(stream.read(8), total)
            places, metadata = parse_header(stream.read(length), total - 8 - length)
    except FormatError as error:
        raise CheckpointError(f"{file}: {error}") from error
    begin = 8 + length
    for name in places:
        if problem := bad_name(name):
            raise CheckpointError(f"{file}: tensor name {name[:80]!r} {problem}")
    tensors = {
        name: TensorInfo(name, p.dtype, p.shape, file, begin + p.start, begin + p.stop)
        for name, p in places.items()
    }
    return tensors, metadata

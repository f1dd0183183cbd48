"""Opening a model on disk: a safetensors file, or a folder with one or with shards.

What is no model, or no whole one, is named as what it is: quantised, empty, no weights at all.
"""

from __future__ import annotations

import os
from pathlib import Path

from dare_agg.checkpoint.beside import beside_in, body_of
from dare_agg.checkpoint.hub_names import missing_path
from dare_agg.checkpoint.quantised import (
    GGUF_SUFFIX,
    QuantisedError,
    check_declared,
    check_not_quantised,
    gguf_refusal,
)
from dare_agg.checkpoint.reader import _SUFFIX, Checkpoint, TensorInfo
from dare_agg.checkpoint.stand_ins import stands_for
from dare_agg.checkpoint.weight_files import weight_files
from dare_agg.errors import CheckpointError, FormatError
from dare_agg.files.safetensors_header import header_length, parse_header
from dare_agg.vectors.layout import bad_name


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
    _check_not_empty(checkpoint)
    return checkpoint


def _check_not_empty(model: Checkpoint) -> None:
    """Raise `CheckpointError` for parameters of shape (0,): sharded training leaves them so."""
    empty = [name for name, info in model.tensors.items() if info.is_float and info.shape == (0,)]
    if empty:
        raise CheckpointError(
            f"{model.path}: {len(empty)} of {len(model.tensors)} tensors are empty, such as "
            f"{empty[0]!r} of shape (0,): the model was saved while its parts lay on several "
            "devices (DeepSpeed ZeRO-3, FSDP); save it again gathered "
            "(stage3_gather_16bit_weights_on_model_save), or make it of the training's checkpoint "
            "with zero_to_fp32.py"
        )


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
            what = stands_for(where, where.stat().st_size) or (
                f"is no {_SUFFIX} file; save the model with safe serialization first"
            )
            raise CheckpointError(f"{where} {what}")
        return Checkpoint(where, *_read_header(where))
    if not where.is_dir():
        raise missing_path(where)
    files, weight_map = weight_files(where)
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    for file in files:
        found, extra = _read_header(file)
        metadata.update(extra)
        beside = beside_in(extra)
        weight_map = {name: of for name, of in weight_map.items() if name not in beside}
        for name, info in found.items():
            if weight_map.get(name, file.name) != file.name:
                continue
            if name in tensors:
                raise CheckpointError(
                    f"{where}: tensor {name!r} is in {tensors[name].file.name} and in {file.name}; "
                    "remove the shards of another model"
                )
            tensors[name] = info
    missing = sorted(weight_map.keys() - tensors.keys())
    if missing:
        raise CheckpointError(
            f"{where}: tensor {missing[0]!r} of the index is not in {weight_map[missing[0]]}; "
            "download or copy the shards and the index again"
        )
    return Checkpoint(where, dict(sorted(tensors.items())), metadata)


def _read_header(file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Read and check a safetensors header: every byte of the file belongs to one tensor."""
    total = file.stat().st_size
    try:
        with file.open("rb") as stream:
            length = header_length(stream.read(8), total)
            places, metadata = parse_header(stream.read(length), total - 8 - length)
    except FormatError as error:
        what = stands_for(file, total)
        raise CheckpointError(f"{file} {what}" if what else f"{file}: {error}") from error
    begin = 8 + length
    for name in places:
        if problem := bad_name(name):
            raise CheckpointError(f"{file}: tensor name {name[:80]!r} {problem}")
    tensors = {
        name: TensorInfo(name, p.dtype, p.shape, file, begin + p.start, begin + p.stop)
        for name, p in body_of(places, metadata).items()
    }
    return tensors, metadata

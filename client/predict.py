"""What a run's model says of new inputs, computed as in training.

``python -m client.predict FOLDER`` reads a JSON object from standard input, ``inputs`` (texts,
files of texts, images, folders of images), ``text_column``, ``batch`` and ``tokens``, and prints
one of predictions. No code of the model's folder is run: networks are this app's own.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from client.config import DEFAULTS, TaskConfig, task_config
from client.data import FILE_READERS, read_texts
from client.images import IMAGE_SUFFIXES
from client.instructions.generation import generate_answers
from client.models import MODELS
from client.rows import Data, Rows
from client.tasks import causal_lm, image_classification, text_classification
from client.tasks.causal_lm import load_tokenizer
from client.text_files import kind_of
from client.training import FineTuning, build_task
from dare_agg.errors import ConfigError, DareError
from dare_agg.files.json_text import parse_json, read_json

_WEIGHTS, _HEAD = "model.safetensors", "head.safetensors"
TEXTS, IMAGES = text_classification.TASK.name, image_classification.TASK.name
LANGUAGE = causal_lm.TASK.name
_EMPTY = Rows((), np.empty(0, np.int64), ())


def read_inputs(words: Sequence[str], column: str) -> tuple[list[str], bool]:
    """The inputs that words mean, and whether they are images.

    A word is a file of texts, an image, a folder of images, or a text itself. Raises
    `ConfigError` for a mixture, a folder without images and what is meant as a file but is none.
    """
    texts: list[str] = []
    images: list[str] = []
    for word in words:
        path = Path(word)
        if len(word) < 1000 and path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
            if not found:
                raise ConfigError(f"{word} holds no images; name a file of texts or a text")
            images += map(str, found)
        elif len(word) < 1000 and path.is_file():
            if path.suffix.lower() in IMAGE_SUFFIXES:
                images.append(word)
            else:
                texts += read_texts(path, column)
        elif " " not in word and kind_of(path) in (*FILE_READERS, *IMAGE_SUFFIXES):
            raise ConfigError(f"file {word!r} does not exist; check the path")
        else:
            texts.append(word)
    if texts and images:
        raise ConfigError(f"{len(texts)} texts and {len(images)} images; give one kind at a time")
    return texts or images, bool(images)


def predict(
    folder: Path, inputs: Sequence[str], *, images: bool, batch: int = 32, tokens: int = 64
) -> list[dict[str, Any]]:
    """A prediction for each input: probabilities by label, or the answer of a language model.

    ``inputs`` are texts, or paths of images. Raises `ConfigError` for a folder that is no run's
    model, inputs of another kind, and an image that cannot be read.
    """
    facts = _facts(folder)
    labels = tuple(facts["labels"])
    config = _config(folder, facts, labels)
    if images != (config.task == IMAGES):
        kind = "images" if images else "texts"
        raise ConfigError(f"{kind} for a model of {config.task}; give what it was trained on")
    if config.task == LANGUAGE:
        return _answers(config, inputs, batch, tokens)
    if not labels:
        raise ConfigError(f"{folder} has no labels: each client keeps a head of its own there")
    rows: tuple[Any, ...] = tuple(map(Path, inputs)) if images else tuple(inputs)
    scores = _scores(folder, config, labels, rows, batch)
    scores -= scores.max(axis=1, keepdims=True)
    shares = np.exp(scores)
    shares /= shares.sum(axis=1, keepdims=True)
    return [
        {
            "input": given,
            "label": labels[int(row.argmax())],
            "probabilities": {
                name: round(float(p), 6) for name, p in zip(labels, row, strict=True)
            },
        }
        for given, row in zip(inputs, shares, strict=True)
    ]


def _facts(folder: Path) -> dict[str, Any]:
    """The run config of the model in a folder, and its labels in order."""
    try:
        config = read_json(folder / "provenance.json")["config"]
        stated = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{folder} holds no model of a run ({type(error).__name__}: {error}); give a run's "
            "folder, or model-METHOD in it"
        ) from error
    named = stated.get("id2label") or {}
    labels = [named[key] for key in sorted(named, key=int)]
    kinds = " ".join(map(str, stated.get("architectures") or ()))
    task = TEXTS
    if "ForCausalLM" in kinds:
        task = LANGUAGE
    elif (folder / "preprocessor_config.json").is_file():
        task = IMAGES
    return {"config": config, "labels": labels, "task": task}


def _config(folder: Path, facts: Mapping[str, Any], labels: tuple[str, ...]) -> TaskConfig:
    """The task's configuration, with the exported model as what is loaded."""
    run = {
        key: ",".join(map(str, value)) if isinstance(value, list | tuple) else value
        for key, value in facts["config"].items()
        if key in DEFAULTS
    }
    model = str(run.get("model", DEFAULTS["model"]))
    own = model if _is_lite(model) else str(folder)
    words = {**DEFAULTS, **run, "task": facts["task"], "model": own, "device": "auto"}
    words |= {"weights": "float32", "train-rows": 0, "test-rows": 0, "packing": False}
    return task_config(words, {}, train="full", labels=labels)


def _is_lite(model: str) -> bool:
    """Whether a built-in model is no folder of transformers' even when it was exported."""
    return model in MODELS and MODELS[model].path.endswith(".pth")


def _scores(
    folder: Path, config: TaskConfig, labels: tuple[str, ...], rows: tuple[Any, ...], batch: int
) -> np.ndarray:
    """Logits (inputs, labels)."""
    import torch

    given = Rows(rows, np.zeros(len(rows), np.int64), ("",) * len(rows))
    task = build_task(config, Data("inputs", _EMPTY, given, labels))
    network, reader = task.network(_state(folder, config, task), "test")
    found = []
    with torch.inference_mode():
        for lo in range(0, len(rows), batch):
            read = reader(np.arange(lo, min(lo + batch, len(rows))))
            found.append(task.kind.scores(network, read).float().cpu().numpy())
    return np.concatenate(found)


def _state(folder: Path, config: TaskConfig, task: FineTuning) -> dict[str, np.ndarray]:
    state = task.initial_state()
    if _is_lite(config.model):
        saved = load_file(folder / _WEIGHTS)
        state |= {f"encoder.{n}": a for n, a in saved.items() if f"encoder.{n}" in state}
    return state | load_file(folder / _HEAD)


def _answers(
    config: TaskConfig, inputs: Sequence[str], batch: int, tokens: int
) -> list[dict[str, Any]]:
    """What a language model answers, or goes on with where it has no chat template."""
    import torch

    task = build_task(config, Data("inputs", _EMPTY, _EMPTY, ()))
    network, _ = task.network(task.initial, "test")
    tokenizer = load_tokenizer(config.model)
    with torch.inference_mode():
        if getattr(tokenizer, "chat_template", None):
            turns: list[Any] = [(("user", text),) for text in inputs]
            said = generate_answers(network, tokenizer, turns, most_tokens=tokens, batch=batch)
        else:
            said = [_continued(network, tokenizer, text, tokens) for text in inputs]
    return [{"input": text, "answer": answer} for text, answer in zip(inputs, said, strict=True)]


def _continued(network: Any, tokenizer: Any, text: str, tokens: int) -> str:
    """The likeliest continuation of a text."""
    coded = tokenizer(text, return_tensors="pt").to(next(network.parameters()).device)
    if not coded["input_ids"].numel():
        raise ConfigError("an empty text has no continuation; give at least one word")
    ids = network.generate(
        **{key: coded[key] for key in ("input_ids", "attention_mask")},
        max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id or 0,
    )  # fmt: skip
    return str(tokenizer.decode(ids[0, coded["input_ids"].shape[1] :], skip_special_tokens=True))


def main() -> int:
    """Entry point."""
    asked = parse_json(sys.stdin.read())
    folder = Path(sys.argv[1])
    try:
        run = _facts(folder)["config"]
        column = asked["text_column"] or str(run.get("text-column", DEFAULTS["text-column"]))
        inputs, images = read_inputs(asked["inputs"], column.partition(",")[0])
        found = predict(folder, inputs, images=images, batch=asked["batch"], tokens=asked["tokens"])
    except (DareError, OSError) as error:
        print(json.dumps({"error": str(error)}))
        return 3
    print(json.dumps({"predictions": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

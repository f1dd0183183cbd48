"""A run's classifier as transformers' own classes load it, whatever else is installed.

Training pools the last states (their mean, or the first token's) under one linear head. Few of
transformers' classes do just that. Where one does, or can be brought to it exactly, its tensors
are written (`STOCK`). Elsewhere the folder brings a class of its own, in one short file that
``trust_remote_code=True`` loads, and tensors that keep transformers' class from loading: it
would put a head on it that nobody trained.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dare_agg.checkpoint.carried import is_tokenizer_file
from dare_agg.files.atomic import replace_file
from dare_agg.files.json_text import read_json
from server.pooled_code import CODE_FILE, image_code, text_code
from server.tensor_file import add_tensors

Tensors = dict[str, NDArray[Any]]
CONFIG, TOKENIZER, PREPROCESSOR = (
    "config.json", "tokenizer_config.json", "preprocessor_config.json",
)  # fmt: skip
TEXT, IMAGE = "text", "image"
_AUTO = {
    TEXT: "AutoModelForSequenceClassification",
    IMAGE: "AutoModelForImageClassification",
}
# tanh is the identity for what is multiplied by this first, to 1e-7 of its values up to 5.
_SMALL = np.float32(2.0**-13)
# Where transformers' classes have their heads: of this shape none of them loads.
GUARDS = (
    "classifier.weight", "classifier.out_proj.weight", "classifier.1.weight", "score.weight",
    "logits_proj.weight", "classification_head.out_proj.weight",
)  # fmt: skip


@dataclass(frozen=True)
class Stock:
    """A class of transformers that scores as a run's classifier does, and what it is given."""

    architecture: str
    tensors: Callable[[NDArray[Any], NDArray[Any]], Tensors]


def _bert(weight: NDArray[Any], bias: NDArray[Any]) -> Tensors:
    width = weight.shape[1]
    return {
        "pooler.dense.weight": np.eye(width, dtype=np.float32) * _SMALL,
        "pooler.dense.bias": np.zeros(width, np.float32),
        "classifier.weight": weight / _SMALL,
        "classifier.bias": bias,
    }


def _roberta(weight: NDArray[Any], bias: NDArray[Any]) -> Tensors:
    width = weight.shape[1]
    return {
        "classifier.dense.weight": np.eye(width, dtype=np.float32) * _SMALL,
        "classifier.dense.bias": np.zeros(width, np.float32),
        "classifier.out_proj.weight": weight / _SMALL,
        "classifier.out_proj.bias": bias,
    }


def _pooled_images(weight: NDArray[Any], bias: NDArray[Any]) -> Tensors:
    return {"classifier.1.weight": weight, "classifier.1.bias": bias}


# By model_type and pooling.
STOCK: Mapping[tuple[str, str], Stock] = {
    ("bert", "cls"): Stock("BertForSequenceClassification", _bert),
    ("roberta", "cls"): Stock("RobertaForSequenceClassification", _roberta),
    ("xlm-roberta", "cls"): Stock("XLMRobertaForSequenceClassification", _roberta),
    ("camembert", "cls"): Stock("CamembertForSequenceClassification", _roberta),
    ("resnet", "mean"): Stock("ResNetForImageClassification", _pooled_images),
    ("regnet", "mean"): Stock("RegNetForImageClassification", _pooled_images),
}
# How a body is called inside transformers' classes, where not as its model_type.
_BODIES = {
    "xlm-roberta": "roberta", "camembert": "roberta", "deberta-v2": "deberta",
    "modernbert": "model",
}  # fmt: skip


@dataclass(frozen=True)
class Written:
    """How an exported classifier is loaded: what it classifies, and whether it brings code."""

    kind: str
    code: bool

    @property
    def pipeline(self) -> str:
        """The hub's and transformers' word for it."""
        return f"{self.kind}-classification"


def write_classifier(
    folder: Path,
    head: Mapping[str, NDArray[Any]],
    *,
    labels: Sequence[str],
    config: Mapping[str, Any],
) -> Written | None:
    """Make the model of ``folder`` (configuration, weights, tokenizer) one that classifies.

    ``head`` has "head.weight" (labels, width) and "head.bias"; ``config`` is the run config.
    Returns None, and changes nothing, where the folder has no configuration or the head is of other
    labels, as where each client keeps its own.
    """
    place = folder / CONFIG
    weight, bias = head.get("head.weight"), head.get("head.bias")
    if weight is None or bias is None or len(labels) != len(weight) or not place.is_file():
        return None
    stated = read_json(place)
    kind = str(stated.get("model_type", ""))
    given = TEXT if any(is_tokenizer_file(f.name) for f in folder.iterdir()) else IMAGE
    pooling = str(config.get("pooling", "mean")) if given == TEXT else "mean"
    weight, bias = np.asarray(weight, np.float32), np.asarray(bias, np.float32)
    stock = STOCK.get((kind, pooling))
    if "auto_map" in stated:  # a class of its own already
        add_tensors(folder, {"pooled_head.weight": weight, "pooled_head.bias": bias})
    elif stock is not None:
        add_tensors(folder, stock.tensors(weight, bias))
        stated["architectures"] = [stock.architecture]
    else:
        body = _BODIES.get(kind, kind.replace("-", "_") or "body")
        make = text_code if given == TEXT else image_code
        (folder / CODE_FILE).write_text(
            make(model_type=kind, body=body, pooling=pooling, width=weight.shape[1], guards=GUARDS),
            encoding="utf-8",
        )
        guards = {name: np.zeros(1, np.float32) for name in GUARDS}
        add_tensors(folder, {"pooled_head.weight": weight, "pooled_head.bias": bias, **guards})
        module = CODE_FILE.removesuffix(".py")
        stated["architectures"] = ["PooledClassifier"]
        stated["auto_map"] = {_AUTO[given]: f"{module}.PooledClassifier"}
    stated["id2label"] = {str(i): name for i, name in enumerate(labels)}
    stated["label2id"] = {name: i for i, name in enumerate(labels)}
    stated["problem_type"] = "single_label_classification"
    write_words(place, stated)
    if given == TEXT:
        _as_trained(folder / TOKENIZER, model_max_length=int(config.get("length", 512)))
    else:
        write_preprocessor(folder, stated, int(config.get("image-size", 0)))
    return Written(given, stock is None)


def write_words(place: Path, words: Mapping[str, Any]) -> None:
    """Replace a JSON file of a model."""
    replace_file(place, ((json.dumps(words, indent=2, ensure_ascii=False) + "\n").encode(),))


def _as_trained(place: Path, **words: Any) -> None:
    found = read_json(place) if place.is_file() else {}
    write_words(place, {**found, **words})


def write_preprocessor(folder: Path, stated: Mapping[str, Any], size: int) -> None:
    """Say how images are read in training: a square from the middle, scaled, with mean and
    deviation of the base."""
    place = folder / PREPROCESSOR
    found = read_json(place) if place.is_file() else {}
    own = stated.get("image_size", 224)
    size = size or int(own[0] if isinstance(own, list) else own)
    half = [0.5, 0.5, 0.5]
    words = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 2,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": found.get("image_mean", stated.get("image_mean", half)),
        "image_std": found.get("image_std", stated.get("image_std", half)),
    }
    write_words(place, words)

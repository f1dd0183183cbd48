"""Files of mergekit's that nobody has published: its methods with settings drawn at random."""

from __future__ import annotations

from typing import Any

import numpy as np

from simulations.bench.mergekit_files.models import BASE, LAYERS, TUNED

_WEIGHED = ("weight",)
_DENSE = ("weight", "density")
# What stands at models, what for all, whether a base is needed, and the models beside it.
_METHODS: dict[str, tuple[tuple[str, ...], tuple[str, ...], bool | None, int, int]] = {
    "linear": (_WEIGHED, ("normalize",), False, 1, 3),
    "slerp": ((), ("t",), True, 1, 1),
    "nuslerp": (_WEIGHED, ("nuslerp_flatten", "nuslerp_row_wise"), None, 2, 2),
    "multislerp": (_WEIGHED, ("normalize_weights",), None, 1, 3),
    "karcher": ((), (), False, 1, 3),
    "model_stock": ((), ("filter_wise",), True, 2, 3),
    "sce": ((), ("select_topk",), True, 1, 3),
    "task_arithmetic": (_WEIGHED, ("normalize", "lambda"), True, 1, 3),
    "ties": (_DENSE, ("normalize", "rescale", "lambda", "int8_mask"), True, 1, 3),
    "breadcrumbs": ((*_DENSE, "gamma"), ("normalize", "rescale", "lambda"), True, 1, 3),
    "breadcrumbs_ties": ((*_DENSE, "gamma"), ("normalize", "rescale", "lambda"), True, 1, 3),
}
_NAMES = ("self_attn", "mlp", "embed_tokens", "lm_head", "norm", "q_proj", "layers.1.", "*")
_REQUIRED = ("weight", "t")


def random_config(rng: np.random.Generator) -> dict[str, Any]:
    """Draw a whole file's values."""
    method = str(rng.choice(list(_METHODS)))
    own, shared, needs_base, least, most = _METHODS[method]
    count = int(rng.integers(least, most + 1))
    models = [str(name) for name in rng.permutation(TUNED)[:count]]
    with_base = bool(rng.integers(2)) if needs_base is None else needs_base
    config: dict[str, Any] = {"merge_method": method}
    if with_base:
        config["base_model"] = BASE
    if rng.random() < 0.3:
        config["dtype"] = str(rng.choice(["float32", "bfloat16", "float16"]))
    common = {key: _setting(rng, key) for key in shared if rng.random() < 0.6 or key == "t"}
    entries = []
    for name in models:
        settings = {key: _setting(rng, key) for key in own if rng.random() < 0.8}
        entries.append({"model": name, **({"parameters": settings} if settings else {})})
    for key in own:
        lacking = any(_leaves_gaps(entry.get("parameters", {}).get(key)) for entry in entries)
        if lacking and (key in _REQUIRED or rng.random() < 0.5):
            common[key] = _setting(rng, key, closed=True)
    sliced = rng.random() < 0.4
    if with_base and (sliced or rng.random() < 0.4):
        entries.insert(int(rng.integers(len(entries) + 1)), {"model": BASE})
    if common:
        config["parameters"] = common
    if sliced:
        sources = [{**entry, "layer_range": [0, LAYERS]} for entry in entries]
        piece: dict[str, Any] = {"sources": sources}
        if common and rng.random() < 0.5:
            piece["parameters"] = config.pop("parameters")
        config["slices"] = [piece]
    else:
        config["models"] = entries
    return config


def _leaves_gaps(setting: Any) -> bool:
    if not isinstance(setting, list):
        return setting is None
    return isinstance(setting[-1], dict) and setting[-1].get("filter", "*") != "*"


def _setting(rng: np.random.Generator, key: str, *, closed: bool = False) -> Any:
    if key in ("normalize", "rescale", "int8_mask", "filter_wise", "normalize_weights") or (
        key.startswith("nuslerp")
    ):
        return bool(rng.integers(2))
    kind = rng.random()
    if kind < 0.5:
        return _number(rng, key)
    if kind < 0.7:
        return _gradient(rng, key)
    entries: list[Any] = []
    for name in rng.choice(_NAMES[:-1], int(rng.integers(1, 4)), replace=False):
        value = _gradient(rng, key) if rng.random() < 0.4 else _number(rng, key)
        entries.append({"filter": str(name), "value": value})
    if closed or key == "t" or rng.random() < 0.6:
        last = {"value": _number(rng, key)}
        entries.append({"filter": "*", **last} if rng.random() < 0.2 else last)
    return entries


def _gradient(rng: np.random.Generator, key: str) -> list[float]:
    return [_number(rng, key) for _ in range(int(rng.integers(1, 6)))]


def _number(rng: np.random.Generator, key: str) -> float:
    if key == "weight":
        return float(rng.choice([0, 1, 0.5, -0.3, round(float(rng.uniform(-0.2, 1.2)), 2)]))
    if key == "gamma":
        return round(float(rng.uniform(0, 0.2)), 3)
    if key == "lambda":
        return float(rng.choice([1, 0.5, round(float(rng.uniform(0, 1.5)), 2)]))
    return float(rng.choice([0, 1, 0.5, round(float(rng.uniform(0, 1)), 2)]))

"""What the words of a configuration may be: the choices of names, the bounds of numbers.

The run config is checked by the server too; a node's own words, and those of code, only here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from client.adapters.cuda_codes import why_no_four_bits
from dare_agg.deploy.devices import PRECISIONS, parse_device
from dare_agg.errors import ConfigError, did_you_mean

ANSWER_FORMS = ("text", "number")
CHOICES: Mapping[str, tuple[str, ...]] = {
    "train": ("full", "lora", "head"),
    "precision": PRECISIONS,
    "weights": ("float32", "bfloat16", "bfloat16-nearest", "nf4"),
    "pooling": ("mean", "cls"),
    "schedule": ("constant", "linear", "cosine"),
    "schedule_over": ("round", "run"),
    "weight_decay_on": ("all", "matrices"),
    "lora_bias": ("none", "all", "lora_only"),
    "answer_form": ANSWER_FORMS,
}
# Beyond these one message would take all memory of whoever trains on it.
BOUNDS: Mapping[str, tuple[int, int]] = {
    "batch": (0, 1 << 14),
    "steps": (0, 1 << 20),
    "epochs": (0, 1 << 12),
    "length": (0, 1 << 15),
    "image_size": (0, 1 << 12),
    "lora_rank": (0, 1 << 12),
    "threads": (1, 1 << 10),
    "generate_rows": (0, 1 << 16),
    "generate_tokens": (1, 1 << 14),
    "accumulate": (1, 1 << 14),
    "early_stop": (0, 1 << 20),
    "early_stop_every": (1, 1 << 20),
}
RANGES: Mapping[str, tuple[float, float]] = {
    "learning_rate": (0, 1e3),
    "head_learning_rate": (0, 1e3),
    "weight_decay": (0, 1e3),
    "warm_up": (0, 1 << 20),
    "clip_norm": (0, 1e9),
    "held_out": (0, 1 << 24),
    "dropout": (0, 0.9),
    "proximal_mu": (0, 1e6),
    "early_stop_rows": (0, 1 << 24),
}


SWITCHES = (
    "checkpointing",
    "keep_optimizer",
)


def check_words(settled: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for the first value (by its field's name) that cannot be."""
    for name, (least, most) in BOUNDS.items():
        value = settled[name]
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{_kebab(name)} = {value!r}; a whole number is needed")
        if not least <= value <= most:
            raise ConfigError(f"{_kebab(name)} = {value}; {least} to {most} are possible")
    for name, (low, high) in RANGES.items():
        value = settled[name]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{_kebab(name)} = {value!r}; a number is needed")
        if not low <= value <= high:  # nor is NaN
            raise ConfigError(f"{_kebab(name)} = {value}; {low:g} to {high:g} are possible")
    for name in SWITCHES:
        if not isinstance(settled[name], bool):
            raise ConfigError(f"{_kebab(name)} = {settled[name]!r}; true or false is needed")
    for name, known in CHOICES.items():
        value = settled[name]
        if value not in known:
            raise ConfigError(
                f"{_kebab(name)} {value!r} is unknown{did_you_mean(str(value), known)}"
            )
    parse_device(str(settled["device"]))
    own, rank = settled.get("lora_own_rank", 0), settled["lora_rank"]
    if own > rank:
        raise ConfigError(
            f"lora-rank = {own} of a node is above the run's {rank}, the rank of the adapters that "
            "all share; raise lora-rank in the run config, or lower the node's"
        )
    if settled["weights"] != "float32" and settled["precision"] == "float16":
        raise ConfigError(
            f'weights = "{settled["weights"]}" with precision = "float16"; such weights are '
            "multiplied in bfloat16: leave precision out"
        )
    if settled["weights"] == "nf4" and settled["train"] != "lora":
        lacks = why_no_four_bits(str(settled["device"]))
        raise ConfigError(
            f'weights = "nf4" with train = "{settled["train"]}": adapters alone are trained on a '
            f"base of four bits{f', and {lacks}' if lacks else '; set train = lora'}"
        )
    for name in ("held_out", "early_stop_rows"):
        held = settled[name]
        if held >= 1 and held != int(held):
            raise ConfigError(
                f"{_kebab(name)} = {held}; a share of a client's rows below 1, or a whole number "
                "of rows"
            )
    if settled["early_stop"] and not settled["early_stop_rows"]:
        raise ConfigError("early-stop needs early-stop-rows, the rows that tell when: 0.1, say")


def _kebab(name: str) -> str:
    return name.replace("_", "-")

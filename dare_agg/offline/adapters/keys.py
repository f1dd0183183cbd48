"""The names in an adapter's file: which part of which module each tensor is.

PEFT saves ``base_model.model.<module>.lora_A.weight``; names inside a running model carry the
adapter's name too (``lora_A.default.weight``), and wrappers leave ``base_layer``,
``modules_to_save`` and others in the path. Whatever is no part of an adapter is a whole tensor.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

PREFIX = "base_model.model."
# Wrappers that stand in a path and are no module of the base's.
_COMPILED = "_orig_mod."
_WRAPPERS = {"token_adapter", "modules_to_save", "ln_tuning_layers"}
_BASE_LAYER = "base_layer"
# The untouched copy of a module that is saved whole; PEFT reads none of it.
_UNTOUCHED = "original_module"
_LEAVES = {"weight", "bias"}
# What PEFT keeps of a method beside the factors and needs for nothing after training.
_OF_TRAINING = ("ranknum", "lora_velora_", "lora_monteclora", "lora_dropout")


@dataclass(frozen=True)
class Part:
    """One tensor of the file: ``part`` is ``lora_A``, ``lora_A.bias``, … of ``module``.

    ``depth`` counts the wrappers around the module, of which several parameters have one each.
    """

    name: str
    module: str
    part: str
    depth: int


@dataclass(frozen=True)
class Names:
    """An adapter's tensors: parts by module and depth, whole tensors by their own name."""

    modules: dict[tuple[str, int], dict[str, str]] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)
    adapters: set[str] = field(default_factory=set)


def parse_names(names: Iterable[str], parts: Collection[str], adapters: Iterable[str]) -> Names:
    """Sort the names of a file; ``parts`` are those of its kind of adapter.

    ``adapters`` are names an adapter may have that stand in its tensors' names.
    """
    known, found = set(adapters), Names()
    for name in sorted(names):
        path = name.removeprefix(PREFIX).removeprefix(_COMPILED).split(".")
        if any(step.startswith(_OF_TRAINING) for step in path) or _UNTOUCHED in path:
            continue
        at = next((i for i in reversed(range(len(path))) if path[i] in parts), -1)
        if at < 0:
            plain = _plain(path, known)
            # The tensor under its own name is the one that PEFT reads.
            if plain not in found.whole or "modules_to_save" not in path:
                found.whole[plain] = name
            continue
        rest = path[at + 1 :]
        leaf = rest.pop() if rest and rest[-1] in _LEAVES else ""
        found.adapters.update(rest)
        part = path[at] + (".bias" if leaf == "bias" else "")
        module = ".".join(step for step in path[:at] if step not in {_BASE_LAYER, *_WRAPPERS})
        depth = _depth(path[:at])
        found.modules.setdefault((module, depth), {})[part] = name
    return found


def _plain(path: list[str], adapters: set[str]) -> str:
    kept: list[str] = []
    for before, step in zip(["", *path], path, strict=False):
        if step == _BASE_LAYER or step in _WRAPPERS:
            continue
        if before in _WRAPPERS and step in adapters:
            continue
        kept.append(step)
    return ".".join(kept)


def _depth(path: list[str]) -> int:
    count = 0
    while count < len(path) and path[-1 - count] == _BASE_LAYER:
        count += 1
    return count

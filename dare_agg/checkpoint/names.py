"""One tensor's names in several files: wrappers, prefixes and the spellings of versions.

A file names a tensor as the code that wrote it did. ``torch.compile``, DDP and FSDP put segments of
their own into names, task models put a prefix before their body's, and versions of transformers
spell one architecture in different ways. None of this is a difference of models. So names are
compared in one spelling, under the prefix that gives most of the wanted ones.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import TypeVar

from dare_agg.vectors.wrappers import unwrapped

T = TypeVar("T")
Shape = tuple[int, ...]

# Old spellings: TensorFlow's norms, weight_norm before it was a parametrization.
_NORMS = {"gamma": "weight", "beta": "bias"}
_WEIGHT_NORM = {
    "weight_g": "parametrizations.weight.original0",
    "weight_v": "parametrizations.weight.original1",
}
# Vision- and audio-language models: `language_model.model.layers` (LLaVA and its kin on the disk),
# `model.language_model.layers` (all of them in memory), `model.layers` (Qwen2-VL on the disk).
_MULTIMODAL = (
    (r"^(?:thinker\.)?(?:model\.)?", ""),
    (r"^(language_model|text_model)\.lm_head\.", "lm_head."),
    (r"^(language_model|text_model)\.model\.", r"\1."),
    (r"^vision_tower\.vision_model\.", "vision_tower."),
    (r"^mlp_AR\.", "projector."),
    (r"^(layers|embed_tokens|norm)\.", r"language_model.\1."),
)
# Vision transformers (ViT, DeiT, BEiT, DINOv2, …): as BERT on the disk, of their own in memory.
_VISION = (
    (r"(^|\.)encoder\.layer\.", r"\1layers."),
    (r"\.attention\.(?:attention|self)\.(query|key|value)\.", r".attention.\1."),
    (r"\.attention\.query\.", ".attention.q_proj."),
    (r"\.attention\.key\.", ".attention.k_proj."),
    (r"\.attention\.value\.", ".attention.v_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.mlp\.weights_out\.", ".mlp.down_proj."),
)
# GPT-NeoX: transformers 5 has the common word.
_OUTPUT = ((r"^embed_out\.", "lm_head."),)
_SPELLINGS = tuple(
    tuple((re.compile(pattern), new) for pattern, new in rules)
    for rules in (_OUTPUT, _MULTIMODAL, _VISION)
)
_COMPILED_MULTIMODAL = _SPELLINGS[1]
# Prefixes that are tried in full, of those that give most names.
_TRIED = 8


def found_names(given: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> dict[str, str]:
    """Return which of ``wanted`` each of the ``given`` names is, where it is one of them.

    Of all spellings and prefixes it is those that give most of ``wanted`` in their shapes, then
    most of them at all, and the names as they are where nothing gives more. No two names
    become one.
    """
    best = {name: name for name in given if name in wanted}
    most = _score(best, given, wanted)
    if most[1] == len(wanted):
        return best
    for rules in _SPELLINGS:
        said = {name: _spelled(name, rules) for name in given}
        goal: dict[str, str] = {}
        for name in wanted:
            goal.setdefault(_spelled(name, rules), name)
        if len(goal) < len(wanted):
            continue
        shapes = {new: given[name] for name, new in said.items()}
        asked = {new: wanted[name] for new, name in goal.items()}
        for strip, add in _ways(shapes, asked):
            pairs = _taken(said, goal, strip, add)
            score = _score(pairs, given, wanted)
            if score > most:
                best, most = pairs, score
    return best


def multimodal_name(name: str) -> str:
    """A tensor of a vision- or audio-language model in the one spelling that is compared."""
    return _spelled(name, _COMPILED_MULTIMODAL)


def under_names(
    given: Mapping[str, T], shapes: Mapping[str, Shape], wanted: Mapping[str, Shape]
) -> dict[str, T]:
    """Return ``given`` under the names of `found_names`; what is none of ``wanted`` keeps its own.

    A name that another tensor takes over is left out.
    """
    found = found_names(shapes, wanted)
    taken = set(found.values())
    return {
        found.get(name, name): value
        for name, value in given.items()
        if name in found or name not in taken
    }


def _spelled(name: str, rules: tuple[tuple[re.Pattern[str], str], ...]) -> str:
    name = unwrapped(name)
    module, _, last = name.rpartition(".")
    if last in _NORMS and "norm" in module.rpartition(".")[2].lower():
        name = f"{module}.{_NORMS[last]}"
    elif last in _WEIGHT_NORM:
        name = f"{module}.{_WEIGHT_NORM[last]}"
    for pattern, new in rules:
        name = pattern.sub(new, name)
    return name


def _changed(name: str, strip: str, add: str) -> str:
    return add + name.removeprefix(strip)


def _taken(
    said: Mapping[str, str], goal: Mapping[str, str], strip: str, add: str
) -> dict[str, str]:
    """Which wanted name each given one is; the names with the prefix come before those without."""
    pairs: dict[str, str] = {}
    taken: set[str] = set()
    for with_prefix in (True, False):
        for name, new in said.items():
            if new.startswith(strip) != with_prefix:
                continue
            found = goal.get(_changed(new, strip, add))
            if found is not None and found not in taken:
                taken.add(found)
                pairs[name] = found
    return pairs


def _score(
    pairs: Mapping[str, str], given: Mapping[str, Shape], wanted: Mapping[str, Shape]
) -> tuple[int, int]:
    same = sum(given[name] == wanted[found] for name, found in pairs.items())
    return same, len(pairs)


def _ways(given: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> list[tuple[str, str]]:
    """Pairs of a prefix to strip and one to add, the likeliest; first none at all."""
    stripped = _before(given, wanted)
    added = _before(wanted, given)
    return [("", ""), *((p, "") for p in sorted(stripped)), *(("", p) for p in sorted(added))]


def _before(long: Mapping[str, Shape], short: Mapping[str, Shape]) -> list[str]:
    """What stands before names of ``short`` in names of ``long``, its dot included; the commonest.

    Those of equal shapes count more than all others.
    """
    found: Counter[str] = Counter()
    for name, shape in long.items():
        at = name.find(".")
        while at >= 0:
            rest = name[at + 1 :]
            if rest in short:
                found[name[: at + 1]] += 1 + (len(short) + 1) * (short[rest] == shape)
            at = name.find(".", at + 1)
    return [p for p, _ in sorted(found.items(), key=lambda item: (-item[1], item[0]))[:_TRIED]]

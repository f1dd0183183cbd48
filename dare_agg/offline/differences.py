"""In which way two models differ, in one true line, with a remedy that works when typed."""

from __future__ import annotations

import shlex
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from dare_agg.checkpoint import Checkpoint
from dare_agg.checkpoint.config import config_of
from dare_agg.checkpoint.embeddings import is_output, is_token_tensor
from dare_agg.checkpoint.families import pattern_of
from dare_agg.checkpoint.vocabulary import has_vocabulary

# Modules that hold in one tensor what others hold in several.
_FUSED = {
    "attention's query, key and value": (
        {"qkv_proj", "query_key_value", "c_attn", "Wqkv", "wqkv", "qkv", "in_proj", "W_pack",
         "attn_qkv", "linear_qkv", "in_proj_weight", "in_proj_bias"},
        {"q_proj", "k_proj", "v_proj", "query", "key", "value", "q", "k", "v", "wq", "wk", "wv",
         "q_lin", "k_lin", "v_lin"},
    ),
    "the gate and up projections": (
        {"gate_up_proj", "w13", "fc1_gate", "linear_fc1", "w1_w3"},
        {"gate_proj", "up_proj", "w1", "w3"},
    ),
}  # fmt: skip
# What the factors of LoRA are called, by PEFT and by tools for images.
_FACTORS = (".lora_A.", ".lora_B.", ".lora_down.", ".lora_up.", "lora_embedding_", "_lora.down.",
            "_lora.up.")  # fmt: skip
# What config.json calls the number of layers.
DEPTH = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "depth")
_WIDTH = (
    "hidden_size", "d_model", "n_embd", "dim", "intermediate_size", "d_ff", "ffn_dim",
    "num_attention_heads", "num_key_value_heads", "head_dim", "d_kv", "patch_size", "image_size",
)  # fmt: skip
_POSITIONS = ("max_position_embeddings", "n_positions", "max_target_positions", "image_size")


@dataclass(frozen=True)
class Difference:
    """What keeps MODEL from being a tuned BASE.

    ``strangers`` are MODEL's names of what BASE lacks, ``missing`` and ``unlike`` BASE's names of
    what MODEL lacks or has in another shape; ``own`` says what MODEL calls BASE's tensors.
    """

    model: Checkpoint
    base: Checkpoint
    strangers: Sequence[str]
    missing: Sequence[str]
    unlike: Sequence[str]
    own: Mapping[str, str]

    @cached_property
    def configs(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The two configurations, those of a language model inside taken in; empty for none."""
        return config_of(self.model), config_of(self.base)

    def setting(self, keys: Iterable[str]) -> str:
        """How the configurations differ in the first of ``keys`` that both have: "k 3, not 2"."""
        mine, theirs = self.configs
        for key in keys:
            if None not in (mine.get(key), theirs.get(key)) and mine[key] != theirs[key]:
                return f"{key} {mine[key]!r:.20}, BASE's {theirs[key]!r:.20}"
        return ""

    def remedy(self) -> str:
        """``--exclude`` with what leaves out all that differs; "" where no short pattern does."""
        names = [*self.strangers, *self.missing, *self.unlike]
        chosen = set(names)
        pattern = pattern_of(names, [name for name in self.base.names if name not in chosen])
        return f"--exclude {shlex.quote(pattern)}" if pattern else ""


def exclusion(names: Iterable[str], base: Checkpoint) -> str:
    """What to type so that these tensors of a model are left out."""
    chosen = set(names)
    pattern = pattern_of(sorted(chosen), [name for name in base.names if name not in chosen])
    return f"leave {'it' if len(chosen) == 1 else 'them'} out: --exclude {shlex.quote(pattern)}"


def why_it_does_not_fit(found: Difference) -> str:
    """Say in which way MODEL differs from BASE, and what helps."""
    for look in (_form, _architecture, _depth, _fused, _shapes):
        said = look(found)
        if said:
            return f"{found.model.path}: {said}"
    return f"{found.model.path} {_parts(found)}"


def _form(found: Difference) -> str:
    """Forms of a file that are not the model's own."""
    parts = [n for n in found.model.names if any(word in n for word in _FACTORS)]
    if parts and 2 * len(parts) > len(found.model.names):
        return (
            f"an adapter's weights by themselves ({parts[0]!r}); give the folder in which PEFT's "
            "adapter_config.json stands beside them, or merge them with the tool that made them "
            "and give the merged model"
        )
    for name in found.strangers:
        if ".lora_A." in name or ".base_layer." in name:
            return (
                f"a PEFT model saved whole ({name!r}); save it after merge_and_unload(), or give "
                "the adapter's own folder"
            )
        if name.endswith("_flat_param"):
            return f"FSDP's flattened parameters ({name!r}); save the model with a full state dict"
    return ""


def _architecture(found: Difference) -> str:
    known = sum(found.model.tensors[own].shape == found.base.tensors[name].shape
                for name, own in found.own.items())  # fmt: skip
    mine, theirs = len(found.model.tensors), len(found.base.tensors)
    if 2 * len(found.own) >= min(mine, theirs) or (known and found.unlike):
        return ""
    types = [str(config.get("model_type", "")) for config in found.configs]
    told = f" ({types[0]}, BASE is {types[1]})" if all(types) and types[0] != types[1] else ""
    first = next(iter(found.strangers), next(iter(found.model.names), ""))
    return (
        f"another model than BASE{told}: {known} of its {mine} tensors are among BASE's {theirs} "
        f"(the first that is not: {first!r}); give a model tuned from BASE"
    )


def _depth(found: Difference) -> str:
    mine, theirs = _numbers(found.model.names), _numbers(found.base.names)
    named = {**{own: own for own in found.strangers}, **{v: k for k, v in found.own.items()}}
    mine = _numbers([named.get(name, name) for name in found.model.names])
    for module in sorted(mine.keys() & theirs.keys(), key=lambda m: (m.count("."), m)):
        here, there = mine[module], theirs[module]
        if here == there or not (here < there or here > there):
            continue
        if said := _predicts_further(found, module, here - there, there - here):
            return said
        what = "experts" if "expert" in module else "layers"
        told = found.setting(DEPTH) if what == "layers" else found.setting(("num_experts",))
        return (
            f"{len(here)} {what} in {module!r}, BASE has {len(there)}"
            f"{f' ({told})' if told else ''}: models of other "
            f"{'depth' if what == 'layers' else 'numbers of experts'} cannot be merged; give a "
            "model tuned from BASE"
        )
    return ""


def _predicts_further(found: Difference, module: str, more: set[int], fewer: set[int]) -> str:
    """Layers behind those that both configurations count: transformers neither loads nor saves
    these heads for tokens further on (multi-token prediction)."""
    counts = [next((c[k] for k in DEPTH if type(c.get(k)) is int), None) for c in found.configs]
    layers = tuple(f"{module}.{number}." for number in more | fewer)
    differing = (*found.strangers, *found.missing, *found.unlike)
    remedy = found.remedy()
    if counts[0] is None or counts[0] != counts[1] or min(more | fewer) < counts[0] or not remedy:
        return ""
    if not all(name.startswith(layers) for name in differing):
        return ""
    lacks, has = ("BASE lacks", "it has") if more else ("it lacks", "BASE has")
    return (
        f"{lacks} {layers[0][:-1]!r}, which {has} behind the {counts[0]} layers that both "
        "configurations count: a head that predicts tokens further on, which transformers neither "
        f"loads nor saves; leave it out: {remedy}"
    )


def _numbers(names: Iterable[str]) -> dict[str, set[int]]:
    """The numbers that follow each module's name: its layers; other numbers in it are ``*``."""
    found: defaultdict[str, set[int]] = defaultdict(set)
    for name in names:
        parts = name.split(".")
        for at, part in enumerate(parts[:-1]):
            if part.isdecimal() and len(part) < 7:
                found[".".join("*" if p.isdecimal() else p for p in parts[:at])].add(int(part))
    return found


def _fused(found: Difference) -> str:
    mine, theirs = _modules(found.strangers), _modules(found.missing)
    for what, (fused, split) in _FUSED.items():
        for held, here, there in (("one tensor", fused, split), ("several tensors", split, fused)):
            own, other = sorted(mine & here), sorted(theirs & there)
            if own and other:
                return (
                    f"{what} are {held} ({', '.join(own)}), in BASE {', '.join(other)}; convert "
                    "one of the two models with the tool that wrote it"
                )
    if any(".parametrizations." in name for name in (*found.strangers, *found.missing)):
        return (
            "weight_norm is in one of the two models and removed from the other; apply or remove "
            "it in both"
        )
    return ""


def _modules(names: Iterable[str]) -> set[str]:
    return {part for name in names for part in name.split(".")[-2:]}


def _shapes(found: Difference) -> str:
    if not found.unlike:
        return ""
    name = next((n for n in found.unlike if is_token_tensor(n)), found.unlike[0])
    here, there = _two_shapes(found, name)
    example = f"{name!r} has shape {here}, BASE's {there}"
    rows = [n for n in found.unlike if _only_rows(found, n)]
    tokens = [n for n in rows if is_token_tensor(n)]
    remedy = found.remedy()
    also = f"; to merge the rest, leave {_out(found)} out: {remedy}" if remedy else ""
    if tokens and len(rows) == len(found.unlike):
        known = has_vocabulary(found.model.folder) and has_vocabulary(found.base.folder)
        align = (
            "; dare-agg merge --vocabulary union (or base) aligns them by token" if known else ""
        )
        return (
            f"a vocabulary of {here[0]} rows, BASE has {there[0]} ({example})"
            f"{align}{also or ('' if known else '; give a model with the vocabulary of BASE')}"
        )
    if len(rows) == len(found.unlike) and all("position" in n for n in rows) and remedy:
        told = found.setting(_POSITIONS)
        return (
            f"other positions{f' ({told})' if told else ''}: {example}; leave {_out(found)} out: "
            f"{remedy}"
        )
    told = found.setting(_WIDTH)
    if 4 * len(found.unlike) < len(found.base.tensors) and remedy and not told:
        return (
            f"{example} ({len(found.unlike)} tensors in all); if that is a task's own head, leave "
            f"{_out(found)} out: {remedy}"
        )
    return (
        f"{len(found.unlike)} of {len(found.base.tensors)} tensors have other shapes, such as "
        f"{example}{f' ({told})' if told else ''}: models of other width cannot be merged; give a "
        "model tuned from BASE"
    )


def _two_shapes(found: Difference, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return found.model.tensors[found.own.get(name, name)].shape, found.base.tensors[name].shape


def _only_rows(found: Difference, name: str) -> bool:
    here, there = _two_shapes(found, name)
    return len(here) == len(there) > 0 and here[1:] == there[1:]


def _out(found: Difference) -> str:
    return "it" if len(found.unlike) + len(found.strangers) + len(found.missing) == 1 else "them"


def _parts(found: Difference) -> str:
    """Tensors that only one of the two has."""
    said = []
    if found.strangers:
        what = "tensor" if len(found.strangers) == 1 else f"{len(found.strangers)} tensors, such as"
        said.append(f"has {what} {found.strangers[0]!r}, that BASE lacks")
    if found.missing:
        what = (
            "tensor"
            if len(found.missing) == 1
            else f"{len(found.missing)} tensors of BASE, such as"
        )
        said.append(f"lacks {what} {found.missing[0]!r}")
    remedy = found.remedy()
    head = "a task's own head" if found.strangers else "no part of what was trained"
    if found.missing and not found.strangers and all(map(is_output, found.missing)):
        mine, theirs = (config.get("tie_word_embeddings") for config in found.configs)
        if mine and not theirs:
            return (
                "ties its head to its embeddings (tie_word_embeddings), BASE has "
                f"{found.missing[0]!r} of its own; leave {_out(found)} out, and OUT keeps BASE's: "
                f"{remedy}"
            )
    heads = [n for n in found.strangers if is_output(n)]
    if heads and not found.missing and _ties(found):
        head = "a head that MODEL has untied from the embeddings"
    end = (
        f"if that is {head}, leave {_out(found)} out: {remedy}"
        if remedy
        else "they have too little in common to leave them out: give a model tuned from BASE"
    )
    return f"{' and '.join(said)}; {end}"


def _ties(found: Difference) -> bool:
    return bool(found.configs[1].get("tie_word_embeddings"))

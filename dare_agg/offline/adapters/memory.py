"""The base's names in memory, as transformers maps them when it loads a folder.

transformers 5 renames, stacks and splits the tensors of some architectures (vision-language
models, mixtures of experts) while it reads them. A module tree without values says how.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from dare_agg.checkpoint import Checkpoint
from dare_agg.files.json_text import read_json
from dare_agg.offline.adapters.names import Piece, Pieces

# No published model has as many of anything that becomes a module of its own.
_MOST_MODULES = 2048
_COUNTS = ("layer", "depth", "block", "expert", "stage", "head")
# What a configuration must not choose here: code, kernels, quantisers.
_LEFT_OUT = (
    "auto_map", "quantization_config", "attn_implementation", "_attn_implementation",
    "experts_implementation", "_experts_implementation", "kernel_config",
)  # fmt: skip
_TASKS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def names_in_memory(
    base: Checkpoint, adapter: Mapping[str, Any], wanted: Sequence[Sequence[str]]
) -> dict[str, Pieces]:
    """Return the base's pieces by the parameters' names in memory; empty where nobody knows.

    The class is the one the adapter was trained with, by its configuration or the base's,
    whichever has most of the ``wanted`` names. Needs transformers and torch.
    """
    if base.folder is None:
        return {}
    try:
        import torch
        import transformers

        values = read_json(base.folder / "config.json")
        _check(values)
        best: dict[str, Pieces] = {}
        for make in _classes(transformers, values, adapter):
            with torch.device("meta"):
                model = make()
            found = _pieces(model, base)
            if _count(found, wanted) > _count(best, wanted) or not best:
                best = found
            if _count(best, wanted) == len(wanted):
                break
        return best
    # Whatever a stranger's configuration makes of another library's constructors: not known.
    except Exception:
        return {}


def model_class(base: Checkpoint) -> str:
    """Name the transformers class that the base's configuration names, or a general one."""
    try:
        values = read_json(base.folder / "config.json") if base.folder else {}
    except (OSError, ValueError):
        values = {}
    named = values.get("architectures") if isinstance(values, dict) else None
    first = named[0] if isinstance(named, list) and named else None
    return first if isinstance(first, str) and first.isidentifier() else "AutoModelForCausalLM"


def task_class(base: Checkpoint, adapter: Mapping[str, Any]) -> str:
    """Name the transformers class that the adapter was trained with."""
    task = adapter.get("task_type")
    if task in _TASKS and task not in ("CAUSAL_LM", "FEATURE_EXTRACTION"):
        return _TASKS[task]
    return model_class(base)


def _count(found: Mapping[str, Pieces], wanted: Sequence[Sequence[str]]) -> int:
    return sum(any(name in found for name in names) for names in wanted)


def _check(values: Any) -> None:
    """Refuse a configuration of more modules than any model has."""
    stack = [values]
    while stack:
        value = stack.pop()
        for key, inner in value.items():
            if isinstance(inner, dict):
                stack.append(inner)
            elif isinstance(inner, list) and len(inner) > _MOST_MODULES:
                raise ValueError(key)
            elif isinstance(inner, int) and inner > _MOST_MODULES:
                if not any(word in key for word in _COUNTS):
                    continue
                raise ValueError(key)


def _cleaned(values: Any) -> Any:
    if not isinstance(values, dict):
        return values
    return {key: _cleaned(inner) for key, inner in values.items() if key not in _LEFT_OUT}


def _classes(
    transformers: Any, values: Mapping[str, Any], adapter: Mapping[str, Any]
) -> Iterator[Callable[[], Any]]:
    """Ways to make the module tree, the likeliest first."""
    kind = transformers.CONFIG_MAPPING[values["model_type"]]
    own = (adapter.get("auto_mapping") or {}).get("base_model_class")
    for name in [own, *(values.get("architectures") or [])]:
        made: Any = getattr(transformers, str(name), None)
        if _is_model(made, transformers):
            yield partial(_built, made._from_config, kind, values)
    for name in (_TASKS.get(str(adapter.get("task_type"))), "AutoModel"):
        if name:
            yield partial(_built, getattr(transformers, name).from_config, kind, values)


def _is_model(made: Any, transformers: Any) -> bool:
    return isinstance(made, type) and issubclass(made, transformers.PreTrainedModel)


def _built(make: Callable[..., Any], kind: Any, values: Mapping[str, Any]) -> Any:
    return make(kind.from_dict(_cleaned(values)), attn_implementation="eager")


def _pieces(model: Any, base: Checkpoint) -> dict[str, Pieces]:
    """Rename the base's tensors as loading would, and say where each parameter's rows lie."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    rules = get_model_conversion_mapping(model) or []
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    meta = model.state_dict()
    shapes = {name: tuple(value.shape) for name, value in meta.items()}
    found: dict[str, Pieces] = {}
    gathered: dict[str, tuple[Any, dict[str, list[str]]]] = {}
    for name in sorted(base.tensors, key=dot_natural_key):
        renamed, pattern = rename_source_key(
            name, renamings, converters, model.base_model_prefix, meta
        )
        if pattern is None:
            found[renamed] = (Piece(name),)
        else:
            rule = by_pattern[pattern]
            gathered.setdefault(renamed, (rule, {}))[1].setdefault(pattern, []).append(name)
    for renamed, (rule, sources) in gathered.items():
        found |= _converted(renamed, rule, sources, base, shapes)
    return found


def _converted(
    renamed: str,
    rule: Any,
    sources: Mapping[str, list[str]],
    base: Checkpoint,
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, Pieces]:
    """The pieces of what a rule stacks, joins or splits by rows; of another rule none."""
    steps = [(type(step).__name__, getattr(step, "dim", None)) for step in rule.operations]
    ordered = [sources[pattern] for pattern in rule.source_patterns if pattern in sources]
    stacked = bool(steps) and steps[0] == ("MergeModulelist", 0)
    joins = steps[1:] if stacked else steps
    if joins in ([], [("Concatenate", 1 if stacked else 0)]) and (stacked or joins):
        pieces, at = [], 0
        for names in ordered:
            rows = base.tensors[names[0]].shape[0]
            for group, name in enumerate(names if stacked else names[:1]):
                pieces.append(Piece(name, group, at, at + rows))
            at += rows
        return {renamed: tuple(pieces)}
    if steps in ([("Chunk", 0)], [("Split", 0)]):
        found: dict[str, Pieces] = {}
        at, first = 0, rule.target_patterns[0]
        for target in rule.target_patterns:
            name = renamed.replace(first, target)
            rows = shapes[name][0]
            found[name] = (Piece(ordered[0][0], 0, 0, rows, at),)
            at += rows
        return found
    return {}

"""mergekit's file as it stands: which models, which slices, which settings, each with its line.

Nothing is decided here; what the words mean for a merge is `dare_agg.offline.mergekit.methods`'.
Keys that mergekit does not know it passes over in silence. Here they end the reading where they
look like one that it knows, else a note names them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dare_agg.errors import did_you_mean
from dare_agg.offline.mergekit.names import ModelName, read_name
from dare_agg.offline.mergekit.words import PARAMETERS, at_line
from dare_agg.offline.yaml_text import Located

_TOP = (
    "merge_method", "base_model", "models", "slices", "modules", "dtype", "out_dtype",
    "tokenizer_source", "tokenizer", "chat_template", "parameters",
)  # fmt: skip
_TOKENIZER = ("source", "tokens", "pad_to_multiple_of")
# Other tools' files, by a key that only they have.
_OTHERS = {
    "experts": "mergekit-moe's, which makes a mixture of experts",
    "gate_mode": "mergekit-moe's, which makes a mixture of experts",
    "layer_slices": "bakllama's; write the slices for passthrough",
    "genome": "mergekit-evolve's, which searches for weights",
}
# How alike a word of mergekit's a misspelt one is; what is less so is another tool's.
_ALIKE = 0.85
_OURS = ("method", "base", "drop-rate")

Settings = Mapping[str, Located]


@dataclass(frozen=True)
class Source:
    """One model of a slice; ``layers`` are [first, stop), None for all of a model."""

    model: ModelName
    line: int
    layers: tuple[int, int] | None = None
    settings: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class Slice:
    """Models that are merged into some of OUT's layers."""

    sources: tuple[Source, ...]
    line: int
    base: ModelName | None = None
    settings: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class Document:
    """A whole file. ``settings`` are those of the modules, then those of the top.

    ``models`` tells that whole models are listed, so that the base counts as one of them;
    ``tokenizer`` holds the section's keys, ``source`` alone for ``tokenizer_source``.
    """

    method: Located
    slices: tuple[Slice, ...]
    models: bool
    base: ModelName | None
    settings: tuple[Settings, ...]
    dtype: Located | None
    out_dtype: Located | None
    tokenizer: Settings
    chat_template: Located | None
    notes: tuple[str, ...]


def is_mergekit(values: Any) -> bool:
    """Whether a file's plain values are of mergekit's form, and not a recipe of ours."""
    if not isinstance(values, Mapping) or any(key in values for key in _OURS):
        return False
    listed = values.get("models")
    if isinstance(listed, list) and any(isinstance(m, Mapping) and "model" in m for m in listed):
        return True
    return any(key in values for key in (*_TOP, *_OTHERS) if key not in ("models", "dtype"))


def read_document(root: Located) -> Document:
    """Read a file's located values.

    Raises `ConfigError` with the line of the first thing that is wrong or not known here.
    """
    notes: list[str] = []
    for key, whose in _OTHERS.items():
        if key in root.value:
            raise at_line(root.value[key].line, f"{key!r} makes this file {whose}")
    top = _mapping(root, "the file")
    _known(top, _TOP, "the file", notes)
    method = _required(top, "merge_method", root.line)
    if not isinstance(method.value, str):
        raise at_line(method.line, "merge_method is a word such as ties")
    given = [key for key in ("models", "slices", "modules") if key in top]
    if len(given) != 1:
        named = ", ".join(f"{key} (line {top[key].line})" for key in given) or "none"
        raise at_line(root.line, f"one of models, slices and modules is needed; there is {named}")
    settings = [_settings(top, notes)]
    body: Settings = top
    if "modules" in top:
        body = _only_module(top["modules"], notes)
        settings.insert(0, _settings(body, notes))
    models = "models" in body
    if models:
        line = body["models"].line
        whole = _sources(body["models"], notes, layers=False)
        slices: tuple[Slice, ...] = (Slice(tuple(whole), line),)
    else:
        parts = _list(_required(body, "slices", root.line), "slices")
        slices = tuple(_slice(part, notes) for part in parts)
    if "tokenizer" in top and "tokenizer_source" in top:
        raise at_line(
            top["tokenizer"].line,
            f"tokenizer and tokenizer_source (line {top['tokenizer_source'].line}) are both given; "
            "leave one of them",
        )
    return Document(
        method=method,
        slices=slices,
        models=models,
        base=_name(top, "base_model"),
        settings=tuple(settings),
        dtype=_given(top, "dtype"),
        out_dtype=_given(top, "out_dtype"),
        tokenizer=_tokenizer(top, notes),
        chat_template=_given(top, "chat_template"),
        notes=tuple(notes),
    )


def _slice(part: Located, notes: list[str]) -> Slice:
    values = _mapping(part, "a slice")
    _known(values, ("sources", "base_model", "parameters", "residual_weight"), "a slice", notes)
    if _given(values, "residual_weight") is not None:
        notes.append(f"line {values['residual_weight'].line}: residual_weight does nothing")
    sources = tuple(_sources(_required(values, "sources", part.line), notes, layers=True))
    return Slice(sources, part.line, _name(values, "base_model"), _settings(values, notes))


def _sources(listed: Located, notes: list[str], *, layers: bool) -> Iterable[Source]:
    for entry in _list(listed, "models"):
        if isinstance(entry.value, str) and not layers:
            raise at_line(entry.line, f"a model is written: - model: {entry.value}")
        values = _mapping(entry, "a model")
        for key in values:
            if key in PARAMETERS:
                raise at_line(
                    values[key].line,
                    f"{key} stands beside the model, where mergekit does not read it; put it under "
                    "parameters:",
                )
        known = ("model", "parameters", "layer_range")
        _known(values, known, "a model", notes)
        model = _name(values, "model")
        if model is None:
            raise at_line(entry.line, "an entry without a model; write - model: PATH")
        span = _span(_required(values, "layer_range", entry.line)) if layers else None
        if not layers and "layer_range" in values:
            notes.append(
                f"line {values['layer_range'].line}: layer_range is read in slices only; whole "
                "models are merged, as mergekit does"
            )
        yield Source(model, entry.line, span, _settings(values, notes))


def _span(given: Located) -> tuple[int, int]:
    span = given.plain()
    whole = isinstance(span, list) and len(span) == 2 and all(type(one) is int for one in span)
    if not whole or not 0 <= span[0] < span[1]:
        raise at_line(
            given.line, f"layer_range {str(span)[:60]} is not [first, stop] with 0 <= first < stop"
        )
    return span[0], span[1]


def _only_module(modules: Located, notes: list[str]) -> Settings:
    named = _mapping(modules, "modules")
    if len(named) != 1:
        raise at_line(
            modules.line,
            f"{len(named)} modules ({', '.join(named)}); one is read: merge the parts one by one, "
            "or whole models by models:",
        )
    body = _mapping(next(iter(named.values())), "a module")
    _known(body, ("slices", "models", "parameters"), "a module", notes)
    return body


def _tokenizer(top: Settings, notes: list[str]) -> Settings:
    if _given(top, "tokenizer_source") is not None:
        return {"source": top["tokenizer_source"]}
    if _given(top, "tokenizer") is None:
        return {}
    section = _mapping(top["tokenizer"], "tokenizer")
    _known(section, _TOKENIZER, "tokenizer", notes)
    line = top["tokenizer"].line
    return {"source": Located("union", line), **{k: v for k, v in section.items() if v.value}}


def _settings(values: Settings, notes: list[str]) -> Settings:
    given = _given(values, "parameters")
    if given is None:
        return {}
    settings = _mapping(given, "parameters")
    _known(settings, tuple(PARAMETERS), "parameters", notes)
    return {key: one for key, one in settings.items() if one.value is not None}


def _name(values: Settings, key: str) -> ModelName | None:
    given = _given(values, key)
    return None if given is None else read_name(given)


def _known(values: Settings, known: tuple[str, ...], where: str, notes: list[str]) -> None:
    for key, one in values.items():
        if key in known:
            continue
        if difflib.get_close_matches(key, known, n=1, cutoff=_ALIKE):
            raise at_line(one.line, f"{key!r} is unknown in {where}{did_you_mean(key, known)}")
        notes.append(f"line {one.line}: {key[:60]!r} is no word of mergekit's: passed over")


def _given(values: Settings, key: str) -> Located | None:
    found = values.get(key)
    return None if found is None or found.value is None else found


def _required(values: Settings, key: str, line: int) -> Located:
    found = _given(values, key)
    if found is None:
        raise at_line(line, f"{key} is missing")
    return found


def _mapping(given: Located, what: str) -> dict[str, Located]:
    if not isinstance(given.value, dict):
        raise at_line(given.line, f"{what} is no mapping of keys to values")
    return given.value


def _list(given: Located, what: str) -> list[Located]:
    if not isinstance(given.value, list) or not given.value:
        raise at_line(given.line, f"{what} is a list with at least one entry")
    return given.value

"""mergekit's file said as a recipe of ours."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dare_agg.checkpoint import open_checkpoint
from dare_agg.checkpoint.hub import in_cache, located
from dare_agg.errors import CheckpointError, ConfigError, did_you_mean
from dare_agg.offline.chat_template import check_template
from dare_agg.offline.mergekit.casting import Cast, Member, cast_of, idle_settings, member_of
from dare_agg.offline.mergekit.document import Document, Source, read_document
from dare_agg.offline.mergekit.methods import METHODS, Reading, Said, without_idle_drops
from dare_agg.offline.mergekit.names import place, same
from dare_agg.offline.mergekit.settings import Scopes
from dare_agg.offline.mergekit.slices import (
    check_filters,
    column,
    combined,
    filled_up,
    pieces_of,
    spans_of,
)
from dare_agg.offline.mergekit.words import WORDS, at_line
from dare_agg.offline.parameters import depth_of_stacks, plain_parameter
from dare_agg.offline.yaml_text import Located

_DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Translation:
    """A recipe's plain values (`dare_agg.offline.recipe`), and what was passed over."""

    values: dict[str, Any]
    notes: tuple[str, ...]


def translated(root: Located, file: Path) -> Translation:
    """Say a file of mergekit's as our recipe; relative paths count from the file's folder.

    Raises `ConfigError` naming file and line for what is wrong or not supported.
    """
    try:
        document = read_document(root)
        return _translated(document, file.absolute().parent)
    except ConfigError as error:
        raise ConfigError(f"{file}, {error}") from error


def _translated(document: Document, folder: Path) -> Translation:
    method = str(document.method.value)
    if method not in METHODS:
        raise at_line(
            document.method.line,
            f"merge_method {method!r} is not supported{did_you_mean(method, METHODS)}",
        )
    word = WORDS[method]
    casts = [cast_of(document, word, part, folder) for part in document.slices]
    notes = [*document.notes, *idle_settings(document, word, casts)]
    whole = len(casts) == 1 and all(_whole(member) for member in casts[0].members)
    spans = spans_of(casts)
    if len(casts[-1].others) > len(casts[0].others):
        notes.append(
            f"line {casts[-1].part.line}: the head and the last norm are merged of all models of "
            "this slice; mergekit 0.1.5 takes as many as the first slice has"
        )
    for cast, span in zip(casts, spans, strict=True):
        check_filters(cast, span, word.own, document.settings)
    casts, parts = filled_up(casts, [_said(document, cast) for cast in casts])
    try:
        said = without_idle_drops(combined(parts, spans))
    except ConfigError as error:
        raise at_line(casts[0].part.line, str(error)) from error
    first = casts[0]
    donor = _donor(document, folder) or first.base or first.others[0]
    values: dict[str, Any] = {"base": donor.place}
    ground = [cast.base or cast.others[0] for cast in casts]
    moved = first.base is not None and first.base.key != donor.key
    # Methods that know no base are the same over any: over the model without its adapter, too.
    if not whole or moved or (donor.adapter is not None and first.base is not None):
        values["base-pieces"] = pieces_of(ground)
    values["models"] = [
        {
            **(_path(first.others[n], donor, first.base) if whole else
               {"path": first.others[n].place, "pieces": pieces_of(column(casts, n))}),
            **_plain(given),
        }
        for n, given in enumerate(said.models)
    ]  # fmt: skip
    # In the order of the file its sums are added, so that their last bits are too.
    values |= {**_plain(said.values), "order": "given"}
    values |= _dtype(document, [m.place for cast in casts for m in cast.members])
    values |= _tokenizer(document, donor.place, folder)
    values |= _chat_template(document)
    return Translation(values, tuple(notes))


def _said(document: Document, cast: Cast) -> Said:
    """What the method says of one slice."""
    above = (cast.part.settings, *document.settings)
    shared = Scopes(above, document.method.line)
    own = [Scopes((m.source.settings, *above), m.source.line) for m in cast.others]
    return METHODS[str(document.method.value)](Reading(shared, own, cast.base is not None))


def _donor(document: Document, folder: Path) -> Member | None:
    """Whose configuration and tokenizer OUT gets: the file's base_model."""
    base = document.base
    return None if base is None else member_of(Source(base, base.line), folder)


def _whole(member: Member) -> bool:
    """Whether a slice takes all of a model's layers, as far as that can be seen from here."""
    layers = member.source.layers
    if layers is None:
        return True
    lies = _local(member.place)
    if lies is None:
        return False
    depths = depth_of_stacks(open_checkpoint(lies).names)
    return layers == (0, max(depths.values(), default=0))


def _path(member: Member, donor: Member, base: Member | None) -> dict[str, str]:
    if member.adapter is None:
        return {"path": member.place}
    ground = base or donor
    if (base is None or base.adapter is None) and same(member.place, ground.place):
        return {"path": member.adapter}
    return {"path": member.place, "adapter": member.adapter}


def _dtype(document: Document, models: Sequence[str]) -> dict[str, str]:
    """OUT's dtype: stated, else float32 where the models have several, else their own."""
    for given in (document.out_dtype, document.dtype):
        if given is not None:
            word = str(given.value).removeprefix("torch.")
            if word not in _DTYPES:
                raise at_line(
                    given.line, f"dtype {str(given.value)[:40]!r}{did_you_mean(word, _DTYPES)}"
                )
            return {"dtype": word}
    found = {_stored_dtype(place) for place in dict.fromkeys(models)} - {None}
    return {"dtype": "float32"} if len(found) > 1 else {}


def _stored_dtype(place: str) -> str | None:
    """The dtype of most of a model's tensors, where it lies on this machine and can be read."""
    try:
        lies = _local(place)
        tensors = () if lies is None else open_checkpoint(lies).tensors.values()
    except CheckpointError:
        # What is wrong with it the merge will say.
        return None
    found = Counter(info.dtype for info in tensors if info.is_float)
    return found.most_common(1)[0][0] if found else None


def _local(place: str) -> Path | None:
    """Where a model lies, unless it had to be downloaded first."""
    path = Path(place) if os.path.exists(place) else in_cache(place)
    return None if path is None else located(path)


def _chat_template(document: Document) -> dict[str, str]:
    given = document.chat_template
    if given is None:
        return {}
    try:
        return {"chat-template": check_template(str(given.value))}
    except ValueError as error:
        raise at_line(given.line, str(error)) from error


def _tokenizer(document: Document, base: str, folder: Path) -> dict[str, str]:
    for key in ("tokens", "pad_to_multiple_of"):
        if key in document.tokenizer:
            raise at_line(
                document.tokenizer[key].line,
                f"tokenizer's {key} is not supported; leave it out: a token has the row of the "
                "base, else that of the models that know it",
            )
    source = document.tokenizer.get("source")
    if source is None:
        return {}
    if source.value in ("base", "union"):
        return {"vocabulary": source.value}
    if not isinstance(source.value, str):
        raise at_line(source.line, "a tokenizer's source is base, union or a model")
    found = place(source.value.removeprefix("model:"), source.line, folder)
    return {"vocabulary": "base"} if same(found, base) else {
        "vocabulary": "base", "tokenizer": found
    }  # fmt: skip


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    plain = {}
    for key, value in values.items():
        plain[key] = _plain(value) if isinstance(value, dict) else plain_parameter(value)
    return plain

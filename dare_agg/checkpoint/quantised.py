"""Quantised checkpoints are told from others, by what their files declare and by their tensors.

Their weights are codes (integers, FP8, packed nibbles) beside scales. Deltas of codes mean
nothing, and codes left as they are under other scales are another model: so `open_checkpoint`
refuses them, wherever a model is taken, and says what helps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from dare_agg.checkpoint.codes import Quantisation, Tensor, all_fp8, quantisation_of
from dare_agg.checkpoint.declared import Declared, declared_by
from dare_agg.errors import CheckpointError

GGUF_SUFFIX = ".gguf"


class QuantisedError(CheckpointError):
    """A checkpoint's weights are codes of a quantiser, not numbers."""

    reason = "quantised"


def check_not_quantised(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise `QuantisedError` where tensors are codes, or a file in ``path`` says so."""
    declared = declared_by(path) if path.is_dir() else None
    found = quantisation_of(tensors)
    if declared is not None:
        file = f"{declared.file} says"
        seen = found.evidence if found else file
        found = Quantisation(declared.kind, seen, found is not None, all_fp8(tensors))
    elif found is not None:
        found = replace(found, dequantises=all_fp8(tensors))
    if found is not None:
        raise refusal(path, found, declared)


def check_declared(folder: Path) -> None:
    """Raise `QuantisedError` where a folder's files say that its weights are quantised."""
    declared = declared_by(folder) if folder.is_dir() else None
    if declared is not None:
        said = Quantisation(declared.kind, f"{declared.file} says", True)
        raise refusal(folder, said, declared)


def gguf_refusal(file: Path) -> QuantisedError:
    """The error for a GGUF file, whose tensors are not read here."""
    return refusal(file, Quantisation("GGUF", "a llama.cpp file", True, True))


def refusal(
    path: Path | str, found: Quantisation, declared: Declared | None = None
) -> QuantisedError:
    """The error for a quantised model: its kind, how that was seen, and what helps."""
    if declared is not None and not found.codes:
        return QuantisedError(
            f"{path}: {declared.file} says that it is quantised ({found.kind}), its tensors are "
            f"floating point; if they are the full-precision weights, take that out of "
            f"{declared.file}, else give the model that it was made from"
        )
    way = f", or make one of the codes: dare-agg dequantise {path} -o OUT"
    return QuantisedError(
        f"{path} is quantised ({found.kind}: {found.evidence}); its weights are codes, which "
        "cannot be merged or compared: give the full-precision model that it was made from"
        f"{way if found.dequantises else ''}"
    )

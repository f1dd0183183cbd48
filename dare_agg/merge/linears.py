"""Which tensors of a layout are the weights of Linears, and which way round they lie."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from dare_agg.errors import MergeError
from dare_agg.merge.task import MergeTask
from dare_agg.vectors.layout import Entry, Layout
from dare_agg.vectors.patterns import compile_patterns, matches

LINEARS = r"weight$"
# What has a row for each token, position or bucket is looked up, not multiplied; a head over the
# vocabulary goes with them, as it is most often tied.
AVERAGED = (
    r"(?i)emb|wte|wpe|(^|\.)shared\.weight$|relative_attention_bias|lm_head|lm_loss|"
    r"predictions|(^|\.)(output|decoder|proj_out|vocab_projector)\.weight$"
)


@dataclass(frozen=True)
class Linear:
    """A Linear's weight: its tensor, and whether that lies (in, out), as Conv1D's do."""

    entry: Entry
    transposed: bool

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        first, second = self.entry.shape
        return (second, first) if self.transposed else (first, second)


def linears_of(task: MergeTask, method: str) -> dict[str, Linear]:
    """The Linears by the options ``linears``, ``averaged`` and ``transposed``.

    Raises `MergeError` where the model has none.
    """
    words = {name: task.options[name] for name in ("linears", "averaged", "transposed")}
    found = model_linears(task.layout, **words)
    if not found:
        raise MergeError(
            f"{method} finds no Linear in the model: no tensor of two dimensions is named as the "
            f"option linears says ({task.options['linears']!r}) and not as averaged does"
        )
    return found


def model_linears(
    layout: Layout, *, linears: str = LINEARS, averaged: str = AVERAGED, transposed: str = ""
) -> dict[str, Linear]:
    """The weights of two dimensions by patterns of their names, by name, in layout order."""
    wanted = compile_patterns([linears])
    kept = compile_patterns([averaged] if averaged else [])
    found = [
        entry
        for entry in layout.entries
        if len(entry.shape) == 2 and entry.size and matches(entry.name, wanted)
        and not matches(entry.name, kept)
    ]  # fmt: skip
    lying = transposed_in(layout)
    if transposed:
        turned = compile_patterns([transposed])
        lying = {entry.name: matches(entry.name, turned) for entry in found}
    return {entry.name: Linear(entry, lying[entry.name]) for entry in found}


def transposed_in(layout: Layout) -> dict[str, bool]:
    """Which weights of two dimensions lie (in, out), by the sizes of their biases.

    A square one lies as those of its last name do (GPT-2's two ``c_proj``).

    >>> from dare_agg.vectors.layout import layout_of
    >>> shapes = {"h.fc.weight": (4, 16), "h.fc.bias": (16,), "head.weight": (3, 4)}
    >>> transposed_in(layout_of(shapes))
    {'h.fc.weight': True, 'head.weight': False}
    """
    shapes: Mapping[str, tuple[int, ...]] = {e.name: e.shape for e in layout.entries}
    lying: dict[str, bool] = {}
    square: list[str] = []
    seen: defaultdict[str, set[bool]] = defaultdict(set)
    for name, shape in shapes.items():
        if len(shape) != 2:
            continue
        bias = shapes.get(name.removesuffix("weight") + "bias")
        if bias is None or shape[0] == shape[1] or len(bias) != 1:
            lying[name] = False
            if shape[0] == shape[1]:
                square.append(name)
            continue
        lying[name] = bias[0] == shape[1]
        seen[_leaf(name)].add(lying[name])
    for name in square:
        lying[name] = seen[_leaf(name)] == {True}
    return lying


def _leaf(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]

"""An adapter's delta over a base's layout: each tensor's contributions, formed block by block."""

from __future__ import annotations

import shlex
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import local

import numpy as np
from numpy.typing import NDArray

from dare_agg.checkpoint import Checkpoint
from dare_agg.checkpoint.config import config_of
from dare_agg.checkpoint.embeddings import is_output, is_token_tensor
from dare_agg.checkpoint.families import is_buffer, pattern_of
from dare_agg.errors import CheckpointError, NonFiniteError
from dare_agg.offline.adapters.folder import AdapterFolder, open_adapter
from dare_agg.offline.adapters.forms import Matrix, Rows, Step, Whole, delta
from dare_agg.offline.adapters.keys import Names, parse_names
from dare_agg.offline.adapters.kinds import check_kind, sent_to_peft, spelled
from dare_agg.offline.adapters.lora import PARTS, lora, parameters
from dare_agg.offline.adapters.memory import names_in_memory
from dare_agg.offline.adapters.names import Find, Pieces, find_names
from dare_agg.offline.adapters.parts import ADD, REPLACE, Contribution, Module
from dare_agg.offline.adapters.tied_heads import has_head, ties_head, without_repeated_head
from dare_agg.offline.adapters.tokens import TOKENS, token_rows
from dare_agg.offline.base import OpenedBase
from dare_agg.vectors.layout import Entry, FloatVector, Layout
from dare_agg.vectors.patterns import Pattern, compile_patterns, matches
from dare_agg.vectors.sources import CachedSource

_BLOCK = 1 << 18
# An attention's output projection inside its base layer.
_INNER_PROJECTION = ".base_layer.out_proj."


@dataclass(frozen=True)
class AdapterSource:
    """The delta of an adapter over a base's layout (a `DeltaSource`).

    Rows are formed in fixed blocks, so the values do not depend on the tiles asked for; the
    factors of one tensor are held at a time.
    """

    layout: Layout
    changes: Mapping[str, Sequence[Contribution]]
    base: CachedSource
    _last: local
    warnings: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        return self.layout.size

    def read(self, lo: int, hi: int, out: FloatVector) -> None:
        out[:] = 0
        for entry, first, last in self.layout.pieces(lo, hi):
            if entry.name in self.changes:
                at = entry.offset - lo
                self._values(entry, first, last, out[at + first : at + last])

    def _values(self, entry: Entry, first: int, last: int, out: FloatVector) -> None:
        contributions = self.changes[entry.name]
        rows, width = _matrix(entry.shape, any(c.stacked for c in contributions))
        count = max(1, _BLOCK // max(1, width))
        done = first
        while done < last:
            block = done // (count * width)
            if getattr(self._last, "key", None) != (entry.name, block):
                stop = min(rows, (block + 1) * count)
                self._last.values = self._block(entry, block * count, stop, width)
                self._last.key = (entry.name, block)
            start = block * count * width
            stop = min(last, start + self._last.values.size)
            out[done - first : stop - first] = self._last.values[done - start : stop - start]
            done = stop

    def _block(self, entry: Entry, first: int, last: int, width: int) -> FloatVector:
        read = partial(self._rows, entry, width)
        if getattr(self._last, "tensor", None) != entry.name:
            steps: list[Step] = []
            for contribution in self.changes[entry.name]:
                steps += contribution.steps(read, tuple(steps))
            self._last.steps, self._last.tensor = steps, entry.name
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            values = delta(self._last.steps, read, first, last, width).reshape(-1)
        if not np.isfinite(values).all():
            raise NonFiniteError(
                f"the delta that an adapter makes of {entry.name!r} is not finite: check how it "
                "was trained"
            )
        return values

    def _rows(self, entry: Entry, width: int, first: int, last: int) -> Matrix:
        out = np.empty((last - first) * width, np.float32)
        self.base.source.read(entry.offset + first * width, entry.offset + last * width, out)
        return out.reshape(last - first, width)


def _matrix(shape: tuple[int, ...], stacked: bool) -> tuple[int, int]:
    if stacked and len(shape) > 2:
        return int(np.prod(shape[:-1])), shape[-1]
    return (shape[0] if shape else 1), int(np.prod(shape[1:]))


def adapter_source(
    path: Path, base: OpenedBase, cached: CachedSource, exclude: Sequence[str] = ()
) -> AdapterSource:
    """Open a LoRA adapter over the base's layout.

    Reads what PEFT's ``merge_and_unload`` would add. Raises `CheckpointError` for another kind
    of adapter, a module the base does not have, shapes that do not fit, or a head that only one
    of the two ties.
    """
    folder = open_adapter(path)
    check_kind(folder, base.checkpoint)
    names = parse_names(folder.tensors.names, PARTS | {TOKENS}, {"default", folder.path.name})
    if len(names.adapters) > 1:
        raise CheckpointError(
            f"{path} holds several adapters ({', '.join(sorted(names.adapters)[:8])}) in one file; "
            "save each by itself: model.save_pretrained(FOLDER, selected_adapters=[NAME])"
        )
    kept = names
    if not has_head(base.checkpoint) or any(map(is_output, base.followers)):
        kept = without_repeated_head(names, folder.tensors)
    if not kept.modules and not kept.whole:
        raise CheckpointError(f"{path} holds no LoRA weights; save the adapter again")
    opening = _Opening(folder, base, kept, compile_patterns(exclude), kept != names)
    changes = opening.changes()
    return AdapterSource(base.layout, changes, cached, local(), opening.warnings(changes))


@dataclass(frozen=True)
class _Opening:
    folder: AdapterFolder
    base: OpenedBase
    names: Names
    excluded: Sequence[Pattern]
    repeats_head: bool = False

    def changes(self) -> dict[str, list[Contribution]]:
        """All contributions by tensor, those of excluded tensors left out."""
        checkpoint, targets = self.base.checkpoint, spelled(self.folder.config)
        wanted = [parameters(module, targets) for module, _ in self.names.modules]
        wanted += [[name] for name in self.names.whole]
        find = find_names(
            wanted, checkpoint.tensors,
            lambda: names_in_memory(checkpoint, self.folder.config, wanted),
        )  # fmt: skip
        found: defaultdict[str, list[Contribution]] = defaultdict(list)
        self._whole_tensors(find, found)
        for (name, _), parts in self.names.modules.items():
            if not any(find(parameter) for parameter in parameters(name, targets)):
                if self._left_out(f"{name}.weight"):
                    continue
                raise self._lacking([f"{name}.weight"])
            inner = any(_INNER_PROJECTION in file for file in parts.values())
            module = Module(self.folder, checkpoint, name, parts, find, targets, inner)
            for contribution in (token_rows if TOKENS in parts else lora)(module):
                self._place(contribution, name, found)
        return {name: sorted(each, key=lambda c: c.order) for name, each in found.items()}

    def _whole_tensors(self, find: Find, found: defaultdict[str, list[Contribution]]) -> None:
        """Tensors that the adapter holds whole: they take the place of the base's."""
        tensors, base = self.folder.tensors, self.base.checkpoint
        places: dict[str, Pieces] = {name: find(name) for name in self.names.whole}
        strangers = [n for n, p in places.items() if not p and not self._ignored(n)]
        if strangers:
            raise self._lacking(strangers)
        unlike = []
        for name, file in self.names.whole.items():
            pieces, shape = places[name], tensors.tensors[file].shape
            if not pieces or not tensors.tensors[file].is_float:
                continue
            tensor = pieces[0].tensor
            if self._left_out(tensor) or self._left_out(name):
                continue
            if len(pieces) > 1 or pieces[0].hi is not None:
                raise sent_to_peft(
                    self.folder, base, f"holds {name!r} whole, which the base has in pieces"
                )
            if base.tensors[tensor].shape != shape:
                unlike.append((tensor, shape))
                continue
            if not _is_base_layer(file):
                self._check_not_parted(tensor)
            width = int(np.prod(shape[1:]))
            step = Whole(partial(_whole_rows, tensors, file, width))
            self._place(
                Contribution(tensor, REPLACE, partial(_only, step), adds=False), name, found
            )
        if unlike:
            raise self._unlike(unlike)

    def _place(
        self, contribution: Contribution, name: str, found: defaultdict[str, list[Contribution]]
    ) -> None:
        tensor = contribution.tensor
        if self._left_out(tensor):
            return
        follows = self.base.followers.get(tensor)
        if follows is not None:
            raise CheckpointError(
                f"{self.folder.path} changes {name!r} alone, which the base ties to {follows!r}: "
                f"as one tensor they cannot part; leave it out: {_exclude([tensor], self.base)}"
            )
        if tensor in self.base.layout:
            found[tensor].append(contribution)

    def warnings(self, changes: Mapping[str, Sequence[Contribution]]) -> tuple[str, ...]:
        """What is to be said of changes that were not trained as they are merged."""
        return tuple(
            f"{self.folder.path} was trained on {tensor!r} without the head that the base ties to "
            "it (ensure_weight_tying): merged, as by PEFT, it changes both"
            for tensor, each in changes.items()
            if any(c.order == ADD for c in each) and self._parted(tensor)
        )

    def _parted(self, tensor: str) -> bool:
        """Whether these are embeddings with a tied head, which the adapter has not."""
        heads = [n for n, first in self.base.followers.items() if first == tensor and is_output(n)]
        inputs = is_token_tensor(tensor) and not is_output(tensor)
        tied = bool(heads) or (inputs and ties_head(self.base.checkpoint))
        return tied and not self.repeats_head

    def _check_not_parted(self, tensor: str) -> None:
        """Refuse embeddings that were trained whole, apart from the head that is tied to them."""
        if self._parted(tensor):
            raise CheckpointError(
                f"{self.folder.path} holds {tensor!r} whole, trained apart from the head that the "
                "base ties to it: as one tensor they cannot part; leave it out: "
                f"{_exclude([tensor], self.base)}"
            )

    def _left_out(self, name: str) -> bool:
        return matches(name, self.excluded)

    def _ignored(self, name: str) -> bool:
        """Whether a whole tensor that the base lacks is left out, or a buffer."""
        shape = self.folder.tensors.tensors[self.names.whole[name]].shape
        return self._left_out(name) or is_buffer(name, shape)

    def _lacking(self, names: Sequence[str]) -> CheckpointError:
        """What an adapter's tensors that the base does not have are."""
        path, base = self.folder.path, self.base.checkpoint
        first = names[0]
        tied = config_of(base).get("tie_word_embeddings")
        if is_output(first) and (tied or (tied is None and base.folder is not None)):
            return CheckpointError(
                f"{path} has a head of its own, {first!r}, and the base ties its head to the "
                "embeddings (tie_word_embeddings): as one tensor they cannot part; leave the head "
                f"out: {_exclude(names, self.base)}"
            )
        if (
            is_token_tensor(first)
            and not is_output(first)
            and any(map(is_token_tensor, base.names))
        ):
            return CheckpointError(
                f"{path} has embeddings of their own, {first!r}, where the base has one tensor for "
                "all: as one they cannot part; leave them out: "
                f"{_exclude(names, self.base)}"
            )
        known = sum(bool(n in base.tensors) for n in self.names.whole)
        if len(names) <= len(self.names.whole) and (self.names.modules or known):
            return CheckpointError(
                f"{path} has {'tensor' if len(names) == 1 else f'{len(names)} tensors, such as'} "
                f"{first!r}, that BASE lacks; if that is a task's own head, leave it out: "
                f"{_exclude(names, self.base)}"
            )
        return CheckpointError(
            f"{path}: the base has no tensor {first!r}; the adapter belongs to another model"
        )

    def _unlike(self, unlike: Sequence[tuple[str, tuple[int, ...]]]) -> CheckpointError:
        """What whole tensors of other shapes are."""
        tensor, shape = unlike[0]
        there = self.base.checkpoint.tensors[tensor].shape
        names = [name for name, _ in unlike]
        out = f"leave {'it' if len(names) == 1 else 'them'} out: {_exclude(names, self.base)}"
        rows = all(s[1:] == self.base.checkpoint.tensors[n].shape[1:] for n, s in unlike)
        if rows and all(is_token_tensor(name) for name in names):
            return CheckpointError(
                f"{self.folder.path} was trained with a vocabulary of {shape[0]} tokens, the base "
                f"has {there[0]} ({tensor!r} has shape {shape}, the base's {there}); to merge the "
                f"rest, {out}"
            )
        return CheckpointError(
            f"{self.folder.path} holds {tensor!r} of shape {shape}, the base's is {there}; if that "
            f"is a task's own head, {out}"
        )


def _exclude(names: Sequence[str], base: OpenedBase) -> str:
    others = [name for name in base.checkpoint.names if name not in names]
    return f"--exclude {shlex.quote(pattern_of(sorted(names), others))}"


def _is_base_layer(file: str) -> bool:
    """Whether a whole tensor is what LoRA was put on, as PEFT saves it beside the factors."""
    return ".base_layer." in file


def _only(step: Step, base: Rows, before: Sequence[Step]) -> Sequence[Step]:
    return [step]


def _whole_rows(
    tensors: Checkpoint, file: str, width: int, first: int, last: int
) -> NDArray[np.float32]:
    from dare_agg.checkpoint import widen

    out = np.empty((last - first) * width, np.float32)
    widen(tensors.raw(file)[first * width : last * width], tensors.tensors[file].dtype, out)
    return out.reshape(last - first, width)

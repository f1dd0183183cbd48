"""The app's own records: what its training code sees, what it returned, what it keeps."""

from __future__ import annotations

import copy
from collections.abc import Container, Iterable, Mapping

import numpy as np
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)
from numpy.typing import NDArray

from dare_agg.errors import LayoutError
from dare_agg.flower.lazy import lazy_record
from dare_agg.flower.records import OURS, STATISTICS_KEY
from dare_agg.flower.transport import to_record
from dare_agg.vectors.model import Arrays
from dare_agg.vectors.patterns import compile_patterns, matches
from dare_agg.vectors.wrappers import unwrapped

Record = ArrayRecord | ConfigRecord | MetricRecord

LOCAL_KEY = OURS + "local"
# The secure sum that the local tensors come from, where they do, and those of one under way.
AFTER_KEY = LOCAL_KEY + ".after"
NEXT_KEY = LOCAL_KEY + ".next"
_SESSION = "session"


def content_for_app(content: RecordDict, key: str, arrays: Mapping[str, Array]) -> RecordDict:
    """Return what the app's own code sees: these arrays, and its own records."""
    return RecordDict({key: lazy_record(arrays), **own_records(content, key)})


def own_records(content: RecordDict, *but: str) -> dict[str, Record]:
    """The app's own records of a message, without those named."""
    return {
        name: record
        for name, record in content.items()
        if name not in but and not name.startswith(OURS)
    }


def with_content(message: Message, content: RecordDict) -> Message:
    """A message like this one, of the same sender, that holds something else."""
    other = copy.copy(message)
    other.content = content
    return other


def trained_record(content: RecordDict, key: str) -> tuple[str, ArrayRecord]:
    """The trained arrays, and the key they were returned under; raises `LayoutError`."""
    found = {
        name: record
        for name, record in content.items()
        if isinstance(record, ArrayRecord) and name != STATISTICS_KEY
    }
    if key not in found and len(found) == 1:
        key = next(iter(found))
    if key not in found:
        raise LayoutError(
            f"the training code returned {len(found)} ArrayRecords, none under {key!r}; return "
            f"the trained arrays as RecordDict({{{key!r}: ArrayRecord(...)}})"
        )
    return key, found[key]


def without_copies(record: ArrayRecord, names: Container[str]) -> dict[str, Array]:
    """The returned tensors but those that the model lacks and that are copies of one it has.

    A loaded model's state_dict holds a tied tensor under each of its names, its file under one.
    """

    known = {n: array for n, array in record.items() if n in names or unwrapped(n) in names}

    def is_copy(array: Array) -> bool:
        alike = (a for a in known.values() if a.shape == array.shape)
        return any(other.data == array.data for other in alike)

    return {n: array for n, array in record.items() if n in known or not is_copy(array)}


def without_model(content: RecordDict, key: str, form: Mapping[str, tuple[int, ...]]) -> RecordDict:
    """What an evaluation returned, without the model that it was given or any of its form.

    ``form`` are the model's shapes by name. Flower's own strategies look at the metrics alone, and
    some apps return the arrays they got.
    """

    def is_model(name: str, record: object) -> bool:
        if not isinstance(record, ArrayRecord) or name.startswith(OURS):
            return False
        return name == key or {n: tuple(a.shape) for n, a in record.items()} == dict(form)

    return RecordDict({n: record for n, record in content.items() if not is_model(n, record)})


def kept_local(context: Context) -> dict[str, Array]:
    """This client's own tensors, as its last round left them."""
    kept = context.state.get(LOCAL_KEY)
    return dict(kept.items()) if isinstance(kept, ArrayRecord) else {}


def keep_local(
    local: Iterable[str], exclude: Iterable[str], tuned: Arrays, context: Context
) -> None:
    """Keep this client's own tensors (heads, buffers) for its next round."""
    kept = _local_of(local, exclude, tuned)
    if kept:
        context.state[LOCAL_KEY] = ArrayRecord({**kept_local(context), **to_record(kept)})
        context.state.pop(AFTER_KEY, None)


def changed_integers(
    local: Iterable[str], exclude: Iterable[str], base: Arrays, tuned: Arrays
) -> tuple[str, ...]:
    """The local integer tensors that training changed although nothing says they are local."""
    patterns = compile_patterns(exclude)
    return tuple(
        name
        for name in local
        if name in base
        and name in tuned
        and base[name].dtype.kind in "iub"
        and not matches(name, patterns)
        and not np.array_equal(base[name], tuned[name])
    )


def unmoved_tensors(names: Iterable[str], base: Arrays, tuned: Arrays) -> tuple[str, ...]:
    """Those of ``names`` that training did not return, or returned as they were."""
    return tuple(name for name in names if name not in tuned or _same(base[name], tuned[name]))


def _same(one: NDArray[np.generic], other: NDArray[np.generic]) -> bool:
    """Whether two arrays hold the same; what was trained differs in its first row."""
    if one is other:
        return True
    first = (0,) * max(one.ndim - 1, 0)
    return np.array_equal(one[first], other[first]) and np.array_equal(one, other)


def set_local_aside(
    local: Iterable[str], exclude: Iterable[str], tuned: Arrays, session: bytes, context: Context
) -> None:
    """Keep them for when this client has put its delta into the sum (`settle_local`)."""
    kept = _local_of(local, exclude, tuned)
    if kept:
        context.state[NEXT_KEY] = to_record(kept)
        context.state[NEXT_KEY + ".of"] = ConfigRecord({_SESSION: session})


def settle_local(session: bytes, context: Context) -> None:
    """Take over what was set aside for a sum; other sums' is forgotten."""
    kept, of = (context.state.pop(key, None) for key in (NEXT_KEY, NEXT_KEY + ".of"))
    if isinstance(of, ConfigRecord) and of[_SESSION] == session and isinstance(kept, ArrayRecord):
        context.state[LOCAL_KEY], context.state[AFTER_KEY] = kept, of


def settled_after(context: Context) -> bytes:
    """The sum that the local tensors come from, b"" for none."""
    after = context.state.get(AFTER_KEY)
    found = after.get(_SESSION) if isinstance(after, ConfigRecord) else None
    return found if isinstance(found, bytes) else b""


def _local_of(local: Iterable[str], exclude: Iterable[str], tuned: Arrays) -> Arrays:
    own, patterns = set(local), compile_patterns(exclude)
    return {name: array for name, array in tuned.items() if name in own or matches(name, patterns)}

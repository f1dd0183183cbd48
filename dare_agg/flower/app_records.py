"""The app's own records: what its training code sees, what it returned, what it keeps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from flwr.app import Array, ArrayRecord, Context, RecordDict

from dare_agg.errors import LayoutError
from dare_agg.flower.records import OURS, STATISTICS_KEY
from dare_agg.flower.transport import to_record
from dare_agg.vectors.model import Arrays
from dare_agg.vectors.patterns import compile_patterns, matches

LOCAL_KEY = OURS + "local"


def content_for_app(
    content: RecordDict, key: str, base: Mapping[str, Array], context: Context
) -> RecordDict:
    """Return what the app's own code sees: full arrays, with this client's local tensors."""
    arrays = dict(base)
    kept = context.state.get(LOCAL_KEY)
    if isinstance(kept, ArrayRecord):
        arrays.update(kept.items())
    others = {
        name: record
        for name, record in content.items()
        if name != key and not name.startswith(OURS)
    }
    return RecordDict({key: ArrayRecord(arrays), **others})


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


def keep_local(
    local: Iterable[str], exclude: Iterable[str], tuned: Arrays, context: Context
) -> None:
    """Keep this client's own tensors (heads, buffers) for its next round."""
    own, patterns = set(local), compile_patterns(exclude)
    kept = {name: array for name, array in tuned.items() if name in own or matches(name, patterns)}
    if kept:
        context.state[LOCAL_KEY] = to_record(kept)

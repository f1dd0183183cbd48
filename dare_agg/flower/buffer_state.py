"""What an asynchronous run leaves on disk between merges, and how it goes on from it.

Beside the state of each merge (`dare_agg.flower.resume`) lie the record of all that happened and
the accepted updates that wait to be merged. A server that dies at any moment goes on with these;
what was under way is lost, and recorded so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import MetricRecord, RecordDict

from dare_agg.errors import StateError
from dare_agg.flower.records import DENSE_KEY, UPDATE_KEY, read_payload
from dare_agg.flower.replies import TrainReply, metrics_and_weight
from dare_agg.rounds.arrivals import Event, Record, read_events
from dare_agg.rounds.buffer import Buffer, Entry, Ticket
from dare_agg.rounds.buffered import is_of_run
from dare_agg.rounds.kept_updates import KeptUpdate, KeptUpdates
from dare_agg.rounds.messages import Receipt
from dare_agg.rounds.server import Accepted, check_reply
from dare_agg.vectors.layout import Layout

ARRIVALS = "arrivals.jsonl"
# Of a merge's state: the buffer after it.
BUFFER = "buffer"
NOTHING_MERGED: Mapping[str, Any] = {"merges": 0, "asked": 0, "open": []}
_MOST_BYTES = 1 << 40


class BufferState:
    """The record and the accepted updates of a run in ``folder``; None keeps nothing."""

    def __init__(self, folder: Path | None) -> None:
        self._record = None if folder is None else Record(folder / ARRIVALS)
        self._kept = None if folder is None else KeptUpdates(folder)
        self._facts: Mapping[str, Any] | None = None
        self._place = 0
        self._merged: set[int] = set()

    def facts(self, buffer: Buffer[TrainReply]) -> dict[str, Any]:
        """What the state of a merge says of the buffer after it."""
        return {
            "merges": buffer.merges,
            "asked": buffer.asked,
            "open": [*buffer.held, *buffer.waiting],
        }

    def take_up(self, facts: Any) -> None:
        """Remember the facts of the state that the run goes on from; raises `StateError`."""
        found = facts if isinstance(facts, Mapping) else {}
        numbers = [found.get("merges"), found.get("asked"), *found.get("open", (None,))]
        if not all(isinstance(number, int) and number >= 0 for number in numbers):
            raise StateError(
                "the run was begun without a buffer, and is to go on with one; leave buffer out, "
                "or begin another run"
            )
        self._facts = found

    def restore(self, buffer: Buffer[TrainReply], layout: Layout) -> None:
        """Bring a new buffer to where the run stands, and the record to what is true of it."""
        facts = self._facts
        if facts is None:
            if self._record is not None and self._kept is not None:
                self._kept.drop(self._kept.numbers())
                self._record.begin()
            return
        buffer.merges, buffer.asked = int(facts["merges"]), int(facts["asked"])
        if self._record is None or self._kept is None:
            return
        events = read_events(self._record.path) if self._record.path.exists() else []
        events, since = _until(events, buffer.merges)
        asked = {event.number: event for event in events if event.kind == "ask"}
        closed = {event.number for event in events if event.kind in ("answer", "lost")}
        gone = {event.number for event in events if event.kind == "lost"}
        buffer.asked = max([buffer.asked, *(number + 1 for number in asked)])
        # An update whose answer was not recorded any more is there as well.
        open_now = {*facts["open"], *since, *(set(asked) - closed)} - gone
        kept = [
            (one, reply)
            for one in self._kept.read(open_now)
            if is_of_run(one.plan, buffer.secret) and (reply := _reply_of(one, layout)) is not None
        ]
        there = {one.ticket.number for one, _ in kept}
        for one, _ in kept:
            if one.ticket.number not in closed:
                ticket = one.ticket
                events.append(Event("answer", ticket.number, ticket.client, ticket.version))
        still = [number for number in asked if number not in closed and number not in there]
        for number in sorted({*still, *(open_now & closed - there)}):
            events.append(
                Event("lost", number, asked[number].client, asked[number].version, "lost")
            )
        self._record.begin(events)
        self._kept.drop(set(self._kept.numbers()) - there)
        self._place = max((one.place + 1 for one, _ in kept), default=0)
        buffer.take_up([Entry(one.ticket, reply, reply.digest) for one, reply in kept])

    def record(self, event: Event) -> None:
        """Append an event."""
        if self._record is not None:
            self._record.add(event)

    def keep(self, ticket: Ticket, reply: TrainReply, content: RecordDict) -> None:
        """Keep an answer that counts, before it is recorded."""
        if self._kept is None:
            return
        said = {
            "weight": reply.accepted.weight,
            "metrics": {
                key: dict(one.items()) for key, one in reply.content.metric_records.items()
            },
            "receipt": _plain(reply.receipt.to_record()),
            "bytes": [reply.update_bytes, reply.dense_bytes, reply.message_bytes],
            "digest": reply.digest.hex(),
        }
        blob = read_payload(content, UPDATE_KEY, _MOST_BYTES)
        assert blob is not None
        dense = read_payload(content, DENSE_KEY, _MOST_BYTES)
        self._kept.put(KeptUpdate(ticket, reply.accepted.plan, self._place, blob, dense, said))
        self._place += 1

    def merged(self, buffer: Buffer[TrainReply]) -> None:
        """A merge was made: forget the updates of the one before, whose state is kept by now."""
        if self._kept is None:
            return
        self._kept.drop(self._merged)
        self._merged = set(self._kept.numbers()) - {*buffer.held, *buffer.waiting}


def _until(events: list[Event], merges: int) -> tuple[list[Event], set[int]]:
    """The events before merge ``merges`` + 1, and who answered after merge ``merges``."""
    since: set[int] = set()
    for place, event in enumerate(events):
        if event.kind == "merge" and event.number > merges:
            return events[:place], since
        if event.kind == "merge":
            since = set()
        elif event.kind == "answer":
            since.add(event.number)
    return events, since


def _plain(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record as JSON bears it: bytes as hex, and numbers that are none left out."""
    return {
        key: value.hex() if isinstance(value, bytes) else value
        for key, value in record.items()
        if not (isinstance(value, float) and not math.isfinite(value))
    }


def _reply_of(kept: KeptUpdate, layout: Layout) -> TrainReply | None:
    """The reply that was kept, judged again; None where it is no more what its plan asks."""
    said = kept.said
    checked = check_reply(kept.plan, kept.blob, kept.dense_blob, said.get("weight"), layout=layout)
    if not isinstance(checked, Accepted):
        return None
    receipt = dict(said["receipt"])
    for word in ("plan", "signature"):
        if word in receipt:
            receipt[word] = bytes.fromhex(receipt[word])
    content = RecordDict({key: MetricRecord(one) for key, one in said["metrics"].items()})
    update_bytes, dense_bytes, message_bytes = said["bytes"]
    return TrainReply(
        node=-1,
        accepted=checked,
        content=content,
        update_bytes=update_bytes,
        dense_bytes=dense_bytes,
        statistics_bytes=0,
        message_bytes=message_bytes,
        receipt=Receipt.read(receipt),
        digest=bytes.fromhex(said["digest"]),
        metrics=metrics_and_weight(content, "", "equal")[0],
    )

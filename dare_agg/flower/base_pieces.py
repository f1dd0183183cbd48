"""A base on its way to clients that have it nowhere: in pieces, each of which is kept.

A client says how many bytes it has, and is sent the next `PIECE_BYTES` from there on; so whoever
was cut off goes on where it was. What is whole counts once its fingerprint is the run's.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from dare_agg.checkpoint.one_file import OneFile
from dare_agg.checkpoint.reader import WEIGHTS_NAME
from dare_agg.downlink.base import BASE, BASE_BYTES, BASE_VERSION
from dare_agg.errors import BaseMissingError, DareError, StateError
from dare_agg.files.atomic import REMEDY, put_in_place
from dare_agg.files.trust import open_own, own_folder
from dare_agg.flower.bases import kept_place, open_base_of
from dare_agg.flower.broadcasting import Broadcasting
from dare_agg.flower.clients import Client
from dare_agg.flower.exchange import exchange
from dare_agg.flower.records import (
    DOWN_PREFIX,
    ORDER_KEY,
    OURS,
    down_payloads,
    failure_of,
    read_answer,
    read_config,
)
from dare_agg.flower.transport import pack
from dare_agg.rounds.fields import Record, read_fields, text, whole
from dare_agg.rounds.messages import ASK_BASE, VERSION, Order, Refusal

LOG = logging.getLogger("flwr")
PIECE_BYTES = 4 << 20
PIECE_KEY = OURS + "piece"


@dataclass(frozen=True, kw_only=True)
class Piece(Record):
    """Where in the base's file the bytes beside it belong."""

    at: int = whole(0)

    @classmethod
    def read(cls, record: ConfigRecord) -> Self:
        """Read it; a malformed one is the beginning's."""
        return cls(**read_fields(cls, record))


@dataclass(frozen=True, kw_only=True)
class Taken(Record):
    """How many bytes of the base a client has, and the base's version once it is whole."""

    at: int = whole(0)
    have: str = text(VERSION, "")

    @classmethod
    def read(cls, record: ConfigRecord) -> Self:
        """Read it; a malformed one says that nothing is there."""
        return cls(**read_fields(cls, record))


def send_base(
    grid: Grid,
    clients: Sequence[Client],
    broadcasting: Broadcasting,
    file: OneFile,
    seconds: float,
) -> None:
    """Bring the base to clients that lack it, to all at once; ``seconds`` are a piece's time.

    Who does not go on is left behind, with a warning: its next order says what it lacks.
    """
    version = broadcasting.base_version
    has: dict[int, int] = {}
    waiting = list(clients)
    while waiting:
        messages = [
            _message(client, broadcasting, file, has.get(client.node)) for client in waiting
        ]
        before, goes_on = dict(has), []
        for index, reply in exchange(grid, messages, seconds):
            client = waiting[index]
            try:
                taken = _taken(reply)
            except DareError as error:
                LOG.warning("node %d does not take the base: %s", client.node, error)
                continue
            if taken.have == version:
                broadcasting.have[client.node] = version
                LOG.info("node %d has the base, %s bytes", client.node, f"{file.size:,}")
            elif client.node not in before or taken.at > before[client.node]:
                has[client.node] = taken.at
                goes_on.append(client)
        waiting = goes_on


def _message(client: Client, broadcasting: Broadcasting, file: OneFile, at: int | None) -> Message:
    """The next piece for a client; the first message only asks how far it is."""
    content = RecordDict(
        {
            ORDER_KEY: ConfigRecord(broadcasting.order(ASK_BASE).to_record()),
            PIECE_KEY: ConfigRecord(Piece(at=at or 0).to_record()),
        }
    )
    if at is not None:
        content[DOWN_PREFIX + BASE] = pack(file.read(at, at + PIECE_BYTES))
    return Message(content, client.node, MessageType.TRAIN)


def _taken(reply: Message) -> Taken:
    if reply.has_error():
        reason, detail = failure_of(reply)
        raise BaseMissingError(f"{reason}: {detail}")
    answer = read_answer(reply.content, Taken)
    if answer is None or isinstance(answer, Refusal):
        raise BaseMissingError("its app does not answer" if answer is None else answer.detail)
    return answer


def take_piece(content: RecordDict, order: Order, folder: Path) -> Taken:
    """Keep a piece where the one before ended; of a base that is whole then, its version.

    Raises `BaseMissingError` for one with another fingerprint, which is thrown away, `StateError`
    where the disk refuses.
    """
    version, size = order.facts[BASE_VERSION], _size(order)
    place = kept_place(folder, version)
    draft = place.with_name(f"{version}.part")
    piece = Piece.read(read_config(content, PIECE_KEY) or ConfigRecord())
    remedy = "name a folder of this user's own (cache in the node config, or DARE_AGG_CACHE)"
    try:
        own_folder(draft, remedy=remedy)
        handle = open_own(draft / WEIGHTS_NAME, os.O_RDWR | os.O_CREAT, remedy=remedy)
        with os.fdopen(handle, "r+b") as file:
            # Clients of one machine that share a cache fill one file.
            fcntl.flock(file, fcntl.LOCK_EX)
            at = file.seek(0, os.SEEK_END)
            payload = down_payloads(content).get(BASE, b"")
            if piece.at == at and at + len(payload) <= size:
                file.write(payload)
                at += len(payload)
                file.flush()
            if at < size:
                return Taken(at=at)
            if not place.exists():
                _settle(draft, place, order)
    except OSError as error:
        raise StateError(f"{draft} was not written: {error.strerror or error}; {REMEDY}") from error
    return Taken(at=at, have=version)


def _settle(draft: Path, place: Path, order: Order) -> None:
    """Put a base that is whole where it is looked for, if it is the run's."""
    found = open_base_of(draft, order).ref.version
    if found != order.facts[BASE_VERSION]:
        shutil.rmtree(draft)
        raise BaseMissingError(
            f"the base that came has fingerprint {found[:12]}, the run's is "
            f"{order.facts[BASE_VERSION][:12]}; it is thrown away: ask for it again"
        )
    put_in_place(draft, place)


def _size(order: Order) -> int:
    told: Any = order.facts.get(BASE_BYTES, "")
    if not told.isdecimal() or len(told) > 15:
        raise BaseMissingError(
            f"the order says that the base has {told[:20]!r} bytes; it is no number"
        )
    return int(told)


__all__ = ["PIECE_BYTES", "Piece", "Taken", "send_base", "take_piece"]

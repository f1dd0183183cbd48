"""The server's loop of one secure sum over Flower's Message API.

Who the nodes are (`meet_parties`), then five exchanges (`run_session`). Answers are taken as
they come; a stage ends when all are there or its time is up, and a party that stayed away or
sent something bad is out from that stage on.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from dare_agg.errors import DareError, ProtocolError
from dare_agg.flower.exchange import exchange
from dare_agg.flower.limits import ReplyLimit
from dare_agg.flower.secure.records import (
    QUERY,
    Introduce,
    Proof,
    Step,
    answer_record,
    content_of,
    hello_input,
    read_message,
)
from dare_agg.flower.transport import message_bytes
from dare_agg.rounds.messages import one_line
from dare_agg.rounds.server import Rejection
from dare_agg.secure.identity import verify
from dare_agg.secure.packing import SecureMeasurements
from dare_agg.secure.party import REQUESTS
from dare_agg.secure.roster import Roster
from dare_agg.secure.server import SecureServer
from dare_agg.secure.stream import packed_bytes

LOG = logging.getLogger("flwr")
Found = TypeVar("Found", covariant=True)
STAGE_SECONDS = 300.0
MOST_CLIPPED = 1e-3
IN_FLIGHT_BYTES = 1 << 26


class SumServer(Protocol[Found]):
    """One secure sum (`SecureServer`), or one of each group (`GroupedServer`)."""

    @property
    def roster(self) -> Roster:
        """Who may take part."""

    @property
    def alive(self) -> tuple[int, ...]:
        """Parties in the sums."""

    def of(self, party: int) -> SecureServer:
        """The sum that a party takes part in."""

    def close(self) -> dict[int, bytes]:
        """End the stage; the next request of each party."""

    def finish(self) -> Found:
        """Take the masks off: the sums."""


@dataclass
class SessionLog:
    """What a session cost and who fell out, filled as it goes."""

    upload: dict[int, int] = field(default_factory=dict)
    download: dict[int, int] = field(default_factory=dict)
    vector_bytes: dict[int, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    rejections: list[Rejection] = field(default_factory=list)

    def reject(self, party: int, reason: str, detail: str) -> None:
        """Note a party that fell out, and why, and log it."""
        self.rejections.append(Rejection(party, reason, detail))
        LOG.warning("secure sum: party %d rejected: %s: %s", party, reason, detail)


def query(content: RecordDict, node: int, seconds: float) -> Message:
    """A message of a secure sum for one node; it lives a minute longer than its stage."""
    return Message(content, node, f"query.{QUERY}", ttl=seconds + 60)


def meet_parties(
    grid: Grid, nodes: Sequence[int], roster: Roster, seconds: float = STAGE_SECONDS
) -> tuple[dict[int, int], dict[int, str]]:
    """Ask nodes to prove which party of the roster they are.

    Returns party → node, and node → why it is none. Each proof signs a fresh challenge.
    """
    challenges = {node: os.urandom(32) for node in nodes}
    messages = [
        query(content_of(Introduce(challenge=challenges[node])), node, seconds) for node in nodes
    ]
    parties: dict[int, int] = {}
    problems = dict.fromkeys(nodes, "it did not answer in time")
    for index, reply in exchange(grid, messages, seconds):
        node = nodes[index]
        try:
            proof = Proof.read(answer_record(reply))
            party = roster.id_of(proof.public)
            said = hello_input(challenges[node], node)
            verify(proof.public, proof.signature, said, f"node {node}")
            if party in parties:
                raise ProtocolError(
                    f"party {party} is there already, as node {parties[party]}", reason="duplicate"
                )
        except DareError as error:
            problems[node] = f"{error.reason}: {one_line(error)}"
            LOG.warning("node %d takes no part in secure sums: %s", node, problems[node])
            continue
        parties[party] = node
        del problems[node]
    return dict(sorted(parties.items())), problems


def waves(parties: Sequence[int], size: int) -> list[Sequence[int]]:
    """Cut parties into groups whose messages of ``size`` bytes may travel at once.

    A SuperLink's database (SQLite) takes one writer at a time: four uploads of 60 MB together
    ended in "database is locked" on a busy machine, and Flower gave the answers up.
    """
    count = max(1, IN_FLIGHT_BYTES // size) if size else len(parties)
    return [parties[at : at + count] for at in range(0, len(parties), max(1, count))]


def run_session(
    grid: Grid,
    server: SumServer[Found],
    nodes: Mapping[int, int],
    first: Callable[[int], Message],
    log: SessionLog,
    *,
    first_seconds: float,
    stage_seconds: float = STAGE_SECONDS,
    model: str = "",
    begin_with: int = 0,
    again: Callable[[int, Message], Message | None] = lambda party, reply: None,
    before: Callable[[str], None] = lambda stage: None,
) -> Found:
    """Run the stages among ``nodes`` (party → node) and return the sums.

    ``first(party)`` makes the message that the adverts answer; ``model`` goes with every
    later request. With fewer adverts than ``begin_with`` the session ends there, before anyone
    has put data in. ``again(party, answer)`` may answer a first answer with another first
    message, once. ``before(stage)`` is called when a later stage is about to be asked for. Raises
    `ProtocolError` as ``server`` does; ``log`` is filled anyhow.
    """
    limit = max(_most_bytes(server.of(party)) for party in nodes)
    messages = {party: first(nodes[party]) for party in sorted(nodes)}
    began = time.monotonic()
    taken = _take_stage(grid, server, messages, "advertise", first_seconds, limit, log, again)
    log.seconds["advertise"] = time.monotonic() - began
    if taken < begin_with:
        why = "; ".join(f"{server.roster[r.client].name}: {r.detail}" for r in log.rejections)
        raise ProtocolError(
            f"{taken} of the {begin_with} parties waited for can take part, no data was put in: "
            f"mend what stops the others, or wait for fewer (min-clients): {why}",
            reason="parties",
        )
    for stage in REQUESTS:
        requests = server.close()
        before(stage)
        began = time.monotonic()
        for some in waves(list(requests), limit if stage == "contribute" else 0):
            messages = {
                party: query(
                    content_of(
                        Step(stage=stage, session=server.of(party).terms.session, model=model),
                        requests[party],
                    ),
                    nodes[party],
                    stage_seconds,
                )
                for party in some
            }
            _take_stage(grid, server, messages, stage, stage_seconds, limit, log)
        log.seconds[stage] = time.monotonic() - began
    began = time.monotonic()
    sums = server.finish()
    log.seconds["unmask"] = time.monotonic() - began
    return sums


def _take_stage(
    grid: Grid,
    server: SumServer[Found],
    messages: Mapping[int, Message],
    stage: str,
    seconds: float,
    limit: int,
    log: SessionLog,
    again: Callable[[int, Message], Message | None] | None = None,
) -> int:
    """Exchange one stage's messages; returns how many answers were taken."""
    parties = list(messages)
    for party in parties:
        size = message_bytes(messages[party].content)
        log.download[party] = log.download.get(party, 0) + size
    until = time.monotonic() + seconds
    silent = set(parties)
    taken, retried = 0, {}
    for index, reply in exchange(grid, list(messages.values()), seconds, ReplyLimit(limit)):
        party = parties[index]
        silent.discard(party)
        if again is not None and (message := again(party, reply)) is not None:
            retried[party] = message
            continue
        try:
            answer_record(reply)
            answer = read_message(reply.content, limit)
            if reply.metadata.src_node_id != messages[party].metadata.dst_node_id:
                raise ProtocolError("it came from another node", reason="unknown-node")
            sender = server.of(party).take(answer)
            if sender != party:
                # It is signed, so it counts; but not for this node.
                raise ProtocolError(f"it is the answer of party {sender}", reason="cohort")
        except DareError as error:
            log.reject(party, error.reason, f"stage {stage}: {one_line(error)}")
            continue
        taken += 1
        log.upload[party] = log.upload.get(party, 0) + message_bytes(reply.content)
        if stage == "contribute":
            log.vector_bytes[party] = len(answer)
    LOG.info("secure sum: stage %s: %d of %d parties answered", stage, taken, len(parties))
    for party in sorted(silent):
        log.reject(party, "late", f"stage {stage}: no answer within {seconds:g} s")
    if retried:
        left = max(0.0, until - time.monotonic())
        taken += _take_stage(grid, server, retried, stage, left, limit, log)
    return taken


def warn_of_clipping(measured: SecureMeasurements, clip: float) -> None:
    """Warn where so many values were cut off that the result is another one."""
    if measured.clipped_share > MOST_CLIPPED:
        LOG.warning(
            "secure sum: %.2g of the values were beyond clip %g and cut off; a larger secure-clip "
            "loses less (nodes allow up to their secure-max-clip)",
            measured.clipped_share,
            clip,
        )


def _most_bytes(server: SecureServer) -> int:
    """Most bytes an honest answer can have, known before any arrives."""
    terms = server.terms
    vector = packed_bytes(terms.words, terms.quantiser.word_bits)
    return max(vector, 128 * len(terms.cohort)) + 4096


__all__ = ["SessionLog", "meet_parties", "query", "run_session", "warn_of_clipping", "waves"]

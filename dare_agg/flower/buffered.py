"""An asynchronous run over Flower's Message API: every K accepted updates are a merge.

A round of the strategy's loop is a merge here (`dare_agg.rounds.buffer`). Each client that is free
is asked to train from the newest version, answers are taken as they come, and who is slow goes on
from the version it has while others merge; so does who trains when a round ends. Nodes that come
later are asked who they are beside the others' work. Evaluations ask clients that do not train.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid

from dare_agg.codec.budget import ClientTerms
from dare_agg.codec.derive import derive_key
from dare_agg.downlink.protocol import Downlink
from dare_agg.errors import DareError, RunError, refuse
from dare_agg.flower.broadcasting import Broadcasting
from dare_agg.flower.buffer_state import BUFFER, BufferState
from dare_agg.flower.clients import Client, Clients
from dare_agg.flower.differential_privacy import check_privacy
from dare_agg.flower.exchange import OpenExchange, online_nodes
from dare_agg.flower.internals import set_lifetime
from dare_agg.flower.replies import Inbox, TrainReply, metrics_and_weight
from dare_agg.flower.round_outcome import Asked
from dare_agg.flower.round_strategy import ROUND_WORD
from dare_agg.flower.standing import Standing
from dare_agg.flower.transport import message_bytes
from dare_agg.flower.waiting import Waiting
from dare_agg.privacy.clients import ClientPrivacy
from dare_agg.rounds.arrivals import Event, Replay, read_events
from dare_agg.rounds.buffer import Answered, Buffer, BufferSettings, Ticket
from dare_agg.rounds.buffered import buffered_plan, check_buffered, has_ranks
from dare_agg.rounds.chain import UpdateStep
from dare_agg.rounds.messages import ASK_TRAIN, Hello, one_line
from dare_agg.rounds.server import Rejection, check_weight
from dare_agg.rounds.settings import FederatedSettings

LOG = logging.getLogger("flwr")
_LOOK_SECONDS = 1.0
_HEAR_SECONDS = 0.25
_Merged = tuple[ArrayRecord | None, MetricRecord | None]


class Merging(Protocol):
    """What the rounds of a buffer need of their strategy, `DareStrategy`."""

    settings: FederatedSettings
    secret: bytes
    run: str
    downlink: Downlink
    broadcasting: Broadcasting
    clients: Clients
    standing: Standing
    weighted_by_key: str
    reply_room: int
    node_timeout: float
    fraction_train: float
    min_available_nodes: int
    min_train_nodes: int
    min_replies: int

    def meet(self, grid: Grid, number: int, least: int) -> list[Client]:
        """All clients online, once there are so many."""

    def hello(self, number: int) -> RecordDict:
        """The question who a client is."""

    def bring_base(self, grid: Grid, clients: Sequence[Client]) -> None:
        """Send the base to those of the clients that have none."""

    def part(self) -> bool:
        """Keep apart the tied tensors that clients found apart; whether there were any."""

    def own_terms(self, hello: Hello) -> ClientTerms | None:
        """The terms of one client now."""

    def signers(self, clients: Sequence[Client]) -> dict[int, tuple[str, str]]:
        """The name and key by which each node's answer must be signed."""

    def merge(
        self,
        asked: Asked,
        every: Sequence[TrainReply],
        rejected: Sequence[Rejection],
        held: Mapping[int, str],
        *,
        number: int = 0,
        told: Mapping[str, Any] | None = None,
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Merge updates and go on from there."""

    def count_empty(
        self, asked: Asked, taken: int, rejections: Sequence[Rejection], *, why: str = ""
    ) -> None:
        """Count a round of too few updates."""


@dataclass
class _Out:
    """A plan that is out: whom it was dealt to, and what came of it."""

    ticket: Ticket
    client: Client
    inbox: Inbox
    message: Message
    until: float


class BufferedRounds:
    """The rounds of a strategy whose clients are waited for by nobody."""

    def __init__(self, settings: BufferSettings, strategy: Merging) -> None:
        self.settings, self.strategy = settings, strategy
        self.state = BufferState(Path(settings.record) if settings.record else None)
        self._buffer: Buffer[TrainReply] | None = None
        self._replay = Replay(read_events(Path(settings.arrivals)) if settings.arrivals else [])
        self._exchange: OpenExchange | None = None
        self._out: dict[int, _Out] = {}
        self._numbers: dict[int, int] = {}  # of messages that are out
        self._came: dict[int, Message] = {}  # answers before their turn in a record
        self._greeted: dict[int, tuple[int, float]] = {}  # of messages: the node, until when
        self._rejected: list[tuple[Rejection, str]] = []
        self._not_merged: dict[str, str] = {}
        self._download: list[int] = []
        self._looked = 0.0

    @property
    def buffer(self) -> Buffer[TrainReply]:
        """The open buffer; the first round makes it."""
        assert self._buffer is not None
        return self._buffer

    # --- a round ---------------------------------------------------------------------------

    def train_round(self, number: int, config: ConfigRecord, grid: Grid, limit: float) -> _Merged:
        """Go on until a buffer is full, and merge it; a client has ``limit`` seconds.

        Raises `RunError` where too few clients are online to fill it, and as `Tally.miss` where
        answers do not count.
        """
        buffer = self._begin(grid, number)
        started = time.monotonic()
        waiting: Waiting | None = None
        buffer.rest_over()
        self._look(grid, now=True)
        while not buffer.full or self._is_due_first():
            if self.strategy.part():
                self._give_up(list(self._out))
            if (due := self._replay.next) is not None:
                self._follow(due, grid, config, limit)
                continue
            self._look(grid)
            while self._came:  # what a record that ended left over
                self._judge(*self._came.popitem())
            self._ask_free(config, limit)
            if len(buffer.in_flight) + len(buffer.held) >= self.settings.size:
                waiting = None
            elif any(buffer.rests(client.hello.name) for client in self._online()):
                return self._too_few(number, started)
            else:
                waiting = waiting or Waiting(self.settings.size)
                self._wait(waiting)
            self._hear(_HEAR_SECONDS)
        return self._merge(number, started)

    def idle(self, grid: Grid) -> list[Client]:
        """The clients online that do not train, by name."""
        self._look(grid, now=True)
        training = {out.client.node for out in self._out.values()}
        return [client for client in self._online() if client.node not in training]

    def facts(self) -> dict[str, Any]:
        """What a round's state keeps."""
        if self._buffer is None:
            return {}
        return {BUFFER: self.state.facts(self.buffer)}

    def take_up(self, facts: Any) -> None:
        """Go on from a round's state; raises `StateError` for one of a run without a buffer.

        What was under way is lost, so that no other record can be followed any more.
        """
        if self._replay.next is not None:
            LOG.warning(
                "a resumed run goes on from its own record, not from %s", self.settings.arrivals
            )
            self._replay = Replay([])
        self.state.take_up(facts)

    def close(self) -> None:
        """Leave those who still train."""
        if self._exchange is not None:
            self._exchange.close()

    # --- inside ----------------------------------------------------------------------------

    def _begin(self, grid: Grid, number: int) -> Buffer[TrainReply]:
        """The open buffer; made in the first round, once enough clients are online."""
        if self._buffer is not None:
            return self._buffer
        strategy, size = self.strategy, self.settings.size
        least = max(strategy.min_available_nodes, strategy.min_train_nodes, size)
        try:
            strategy.meet(grid, number, least)
        except RunError as error:
            if error.reason != "nodes":
                raise
            raise RunError(
                f"buffer = {size}, and each client is in a buffer at most once: {error}",
                reason="nodes",
            ) from error
        self._exchange = OpenExchange(grid)
        layout = strategy.broadcasting.model.groups.layout
        buffer: Buffer[TrainReply] = Buffer(
            self.settings, strategy.secret, has_ranks(strategy.settings)
        )
        self.state.restore(buffer, layout)
        buffer.tell = self._note
        self._buffer = buffer
        return buffer

    def _note(self, event: Event) -> None:
        self._replay.follow(event)
        self.state.record(event)

    def _online(self) -> list[Client]:
        """The clients that are online, by name; of two of one name the one met last."""
        known, online = self.strategy.clients.known, set(self.strategy.clients.online)
        named = {c.hello.name: c for node, c in known.items() if node in online}
        return sorted(named.values(), key=lambda client: client.hello.order())

    def _look(self, grid: Grid, *, now: bool = False) -> None:
        """See who is online, and ask those who are new who they are."""
        if not now and time.monotonic() - self._looked < _LOOK_SECONDS:
            return
        clients = self.strategy.clients
        clients.online, self._looked = online_nodes(grid), time.monotonic()
        greeted = {node for node, until in self._greeted.values() if until > self._looked}
        for node in clients.unmet():
            if node not in greeted:
                hello = self.strategy.hello(self.buffer.merges + 1)
                message = clients.question(hello, node, clients.hello_timeout)
                self._greeted[id(message)] = node, self._looked + clients.hello_timeout
                self._send(message)

    def _ask_free(self, config: ConfigRecord, limit: float) -> None:
        """Ask the clients that are free, as many as may train at a time."""
        buffer, strategy = self.buffer, self.strategy
        online = self._online()
        free = [client for client in online if buffer.is_free(client.hello.name)]
        most = max(int(len(online) * strategy.fraction_train), strategy.min_train_nodes, 1)
        asked = False
        while free and len(buffer.in_flight) < most:
            place = 0
            if strategy.fraction_train < 1:
                key = derive_key(strategy.secret, "buffer-draw", buffer.asked)
                place = int.from_bytes(key[:8], "little") % len(free)
            self._ask(free.pop(place), config, limit)
            asked = True
        if asked:
            self._tell()

    def _ask(self, client: Client, config: ConfigRecord, limit: float) -> None:
        """Ask a client to train from the newest version."""
        buffer, strategy = self.buffer, self.strategy
        broadcasting, name = strategy.broadcasting, client.hello.name
        model, terms = broadcasting.model, strategy.settings.terms
        own = strategy.own_terms(client.hello)
        ticket = buffer.ask(name, terms.drop_rate if own is None else own.drop_rate)
        plan = buffered_plan(
            strategy.secret,
            ticket,
            terms,
            model.ref,
            own,
            run=strategy.run,
            shared_mask=strategy.settings.shared_mask,
            layout=model.groups.layout,
        )
        if not ticket.number:
            check_privacy(config, strategy.settings, strategy.downlink, [plan], model.groups)
        order = broadcasting.order(ASK_TRAIN, plan)
        order = replace(order, not_merged=one_line(self._not_merged.pop(name, "")))
        asked = ConfigRecord({**config, ROUND_WORD: plan.round})
        message = Message(
            broadcasting.content(client, order, asked), client.node, MessageType.TRAIN
        )
        set_lifetime(message, limit + 60)
        inbox = Inbox(
            {client.node: plan},
            strategy.weighted_by_key,
            strategy.settings.weighting,
            signers=strategy.signers([client]),
            layout=model.groups.layout,
        )
        self._download.append(message_bytes(message.content))
        self._out[ticket.number] = _Out(ticket, client, inbox, message, time.monotonic() + limit)
        self._numbers[id(message)] = ticket.number
        self._send(message, inbox)

    def _send(self, message: Message, inbox: Inbox | None = None) -> None:
        assert self._exchange is not None
        try:
            if inbox is None:
                self._exchange.send([message])
            else:
                self._exchange.send([message], inbox.limit(self.strategy.reply_room))
        except RunError as error:
            if error.reason != "push":
                raise
            self._greeted.pop(id(message), None)
            if (number := self._numbers.get(id(message))) is not None:
                self._reject(number, Rejection(number, "push", str(error)))

    def _hear(self, seconds: float) -> None:
        """Take the next answer, if one comes, and give up those who are too late."""
        assert self._exchange is not None
        found = self._exchange.next(seconds)
        if found is not None:
            sent, reply = found
            if (greeted := self._greeted.pop(id(sent), None)) is not None:
                self.strategy.clients.hear(greeted[0], reply)
                self._bring_base(greeted[0])
            elif (number := self._numbers.pop(id(sent), None)) is not None:
                if self._replay.next is None:
                    self._judge(number, reply)
                else:
                    self._came[number] = reply
        now = time.monotonic()
        for number, out in list(self._out.items()):
            if now > out.until and self._replay.next is None:
                self._exchange.forget(out.message)
                late = "no answer in the time that a client has (deadline)"
                self._reject(number, Rejection(number, "late", late))

    def _bring_base(self, node: int) -> None:
        client, exchange = self.strategy.clients.known.get(node), self._exchange
        if client is not None and exchange is not None:
            self.strategy.bring_base(exchange.grid, [client])

    def _judge(self, number: int, reply: Message) -> None:
        """Judge the answer to a plan; what counts goes into the buffer."""
        buffer, out = self.buffer, self._out.get(number)
        if out is None:  # given up
            return
        broadcasting, node = self.strategy.broadcasting, out.client.node
        if broadcasting.lost_version(node, reply):
            LOG.info("client %s no longer holds its version; it is asked anew", out.ticket.client)
            self._close(number)
            buffer.lose(number, reason="base", rest=False)
            return
        broadcasting.note_apart(reply)
        out.inbox.take(node, reply)
        judged = out.inbox.replies.get(node)
        if judged is None:
            found = [*out.inbox.rejections.values(), *out.inbox.strangers]
            self._reject(number, replace(found[0], client=number))
            return
        try:
            metrics, weight = metrics_and_weight(
                judged.content, out.inbox.weighted_by_key, out.inbox.weighting
            )
            terms = judged.accepted.plan.terms
            accepted = replace(judged.accepted, weight=check_weight(weight, terms.max_weight))
        except DareError as error:
            self._reject(number, Rejection(number, error.reason, one_line(error)))
            return
        judged = replace(judged, accepted=accepted, metrics=metrics)
        broadcasting.have[node] = judged.receipt.have
        if buffer.staleness(out.ticket) <= self.settings.max_staleness:
            self.state.keep(out.ticket, judged, reply.content)
        self._close(number)
        answered = buffer.answer(number, judged, judged.digest)
        self._leave_out(answered)
        self._tell()

    def _close(self, number: int) -> None:
        out = self._out.pop(number)
        self._numbers.pop(id(out.message), None)

    def _reject(self, number: int, rejection: Rejection) -> None:
        """An answer does not count; its client is told why with its next order."""
        name = self._out[number].client.hello.name
        self._close(number)
        self.buffer.lose(number, reason=rejection.reason, rest=rejection.reason != "lost")
        self._note_not_merged(rejection, name)

    def _leave_out(self, answered: Answered) -> None:
        if answered.reason is not None and answered.ticket is not None:
            number = answered.ticket.number
            rejection = Rejection(number, answered.reason, answered.detail)
            LOG.warning("client %s: %s: %s", answered.ticket.client, *_why(rejection))
            self._note_not_merged(rejection, answered.ticket.client)

    def _note_not_merged(self, rejection: Rejection, name: str) -> None:
        self._rejected.append((rejection, name))
        self._not_merged[name] = ": ".join(_why(rejection))

    def _give_up(self, numbers: Sequence[int]) -> None:
        """Tensors are grouped anew: updates of the old groups fit no more."""
        buffer = self.buffer
        assert self._exchange is not None
        for number in numbers:
            self._exchange.forget(self._out[number].message)
            self._close(number)
        for number in [*buffer.in_flight, *buffer.held, *buffer.waiting]:
            buffer.lose(number, reason="tied", rest=False)
        buffer.rest_over()

    def _follow(self, due: Event, grid: Grid, config: ConfigRecord, limit: float) -> None:
        """Do what the record says comes next, once it can be done."""
        buffer = self.buffer
        until = time.monotonic() + limit
        while due.kind == "ask":
            found = [client for client in self._online() if client.hello.name == due.client]
            if found:
                self._ask(found[0], config, limit)
                return
            self._await(until, grid, f"client {due.client!r} to be online")
        while due.kind == "answer":
            if (reply := self._came.pop(due.number, None)) is not None:
                self._judge(due.number, reply)
                return
            if due.number not in self._out:
                break
            self._await(until, grid, f"the answer of client {due.client!r}")
        if due.kind == "lost":
            if (out := self._out.get(due.number)) is not None:
                assert self._exchange is not None
                self._exchange.forget(out.message)
                # Whether it came to the version it was sent is not known.
                self.strategy.broadcasting.have[out.client.node] = ""
                self._close(due.number)
            buffer.lose(due.number, reason=due.why, rest=False)
            return
        raise RunError(
            f"the record has {due.to_line()} next, which cannot be; its settings are others, or it "
            "was changed: leave it out"
        )

    def _is_due_first(self) -> bool:
        """Whether the record has something before the merge of a full buffer.

        A run that was killed between its last answer and the merge lost what was under way first.
        """
        return self._replay.next is not None and self._replay.next.kind != "merge"

    def _await(self, until: float, grid: Grid, what: str) -> None:
        if time.monotonic() > until:
            raise RunError(
                f"the record is followed, and {what} is waited for in vain; start the clients of "
                "the run that was recorded, or leave the record out",
                reason="nodes",
            )
        self._look(grid)
        self._hear(_HEAR_SECONDS)

    def _wait(self, waiting: Waiting) -> None:
        """Too few clients are online to fill the buffer: wait for others, not for ever."""
        clients = self.strategy.clients
        online = self._online()
        waiting.say(len(online), len(clients.turned_away()))
        if time.monotonic() - waiting.began > self.strategy.node_timeout:
            raise RunError(
                f"a buffer of {self.settings.size} updates has {len(self.buffer.held)}, and "
                f"{len(online)} clients are online, each of which is in it at most once; start "
                "more SuperNodes, or lower buffer",
                reason="nodes",
            )

    def _tell(self) -> None:
        held = len(self.buffer.held)
        nodes = [out.client.node for out in self._out.values()]
        self.strategy.standing.fill(self.settings.size, held, nodes)

    # --- its end ---------------------------------------------------------------------------

    def _asked(self, number: int, started: float, names: dict[int, str]) -> Asked:
        told = {rejection.client: name for rejection, name in self._rejected}
        duplicates = self.buffer.counts["duplicate"]
        asked = Asked(number, started, {**told, **names}, tuple(self._download), duplicates)
        self._download = []
        return asked

    def _taken_rejections(self) -> list[Rejection]:
        rejections = [rejection for rejection, _ in self._rejected]
        self._rejected = []
        return rejections

    def _merge(self, number: int, started: float) -> _Merged:
        buffer, strategy = self.buffer, self.strategy
        counts, training = dict(buffer.counts), len(buffer.in_flight)
        strategy.standing.note("merge")
        entries, late = buffer.flush()
        for one in late:
            self._leave_out(one)
        names = {entry.ticket.number: entry.ticket.client for entry in entries}
        asked = self._asked(number, started, names)
        told = {
            "size": self.settings.size,
            "merge": buffer.merges,
            "in_flight": training,
            "waits": counts.get("waits", 0),
            "stale": counts.get("stale", 0) + len(late),
        }
        merged = strategy.merge(
            asked,
            [entry.update for entry in entries],
            self._taken_rejections(),
            {},
            number=buffer.merges,
            told=told,
        )
        self.state.merged(buffer)
        return merged

    def _too_few(self, number: int, started: float) -> _Merged:
        """Nobody is left to ask until the next round: its answers did not count."""
        held = len(self.buffer.held)
        asked = self._asked(number, started, {})
        why = f"round {number}: a buffer of {self.settings.size} updates has {held}, and nobody is "
        why += "left to ask"
        self.strategy.count_empty(asked, 0, self._taken_rejections(), why=why)
        return None, None


def _why(rejection: Rejection) -> tuple[str, str]:
    return rejection.reason, rejection.detail


def buffered_rounds(
    strategy: Merging,
    buffer: int | BufferSettings,
    steps: Sequence[UpdateStep],
    privacy: ClientPrivacy | None,
    *,
    chosen: bool,
) -> BufferedRounds:
    """The rounds of a strategy with a buffer; raises `ConfigError` for what that cannot do.

    ``chosen`` says that the rounds choose their drop rate.
    """
    found = buffer if isinstance(buffer, BufferSettings) else BufferSettings(buffer)
    refusals = (
        (privacy, "and privacy of clients: its accounting rests on draws that say who is in which "
         "release, and in a buffer speed says it, which others see; leave buffer out"),
        (strategy.min_replies > found.size, f"and min_replies = {strategy.min_replies}: a merge "
         f"has {found.size} updates; lower min_replies"),
        (not strategy.fraction_train, "and fraction_train = 0: nobody trains; raise it"),
    )  # fmt: skip
    refuse(refusals, f"buffer = {found.size}")
    rate = None if chosen else strategy.settings.terms.drop_rate
    check_buffered(strategy.settings, found, drop_rate=rate, steps=steps)
    return BufferedRounds(found, strategy)

"""The buffer of an asynchronous run: who is asked what, which answers count, when it is merged.

Clients train from the version that they were given; every K accepted updates make a merge, and
nobody is waited for (FedBuff, arXiv 2106.06581). Here is the book-keeping alone: no clock, no wire,
no arithmetic. Whoever drives it calls `Buffer.ask`, `Buffer.answer` and `Buffer.lose` in some
order, and equal orders make equal plans, buffers and bits.

**Who is in a buffer.** A client whose update is in the open buffer is asked again once that is
merged, so it is in a buffer at most once, and K may be at most the number of clients. One whose
answer does not count rests until the next merge: what is wrong with it would be wrong at once
again.

**Masks.** An update's mask is fixed when its client is asked, and nobody knows then which updates
it will meet. A key of the version alone, as a round has it, would make masks of plans of one
version disjoint and let those of two versions overlap at random. So where ranks suffice, 2K ≤
⌊1/(1−p)⌋, all plans of a drop rate share one mask key for the whole run: it cuts the elements at
random into ⌊1/(1−p)⌋ disjoint parts, and a plan is one of them, its rank. Ranks are drawn anew for
each plan, among those that neither the open buffer has nor an open plan of the last two versions.
(Older plans do not count there: what a slow client holds would be sent by nobody else until it
comes back.) Since such a client may still meet its own rank in a buffer, an update whose rank is in
it already waits for the next one, and its client goes on meanwhile. So the masks of a buffer are
disjoint, always; each plan is a random part, so that updates are unbiased; and the union that a
step goes down on is named by one key and some ranks.

For more updates than that, and for what has no such ranks (every value sent, one mask for all, keep
rates by tensor), ranks are counted through among the plans of a version, as in a round.

**Age.** τ of an update are the merges since its client was asked. One of more than
``max_staleness`` does not count: its client is told so, and its next order brings it to the newest
version in one message, by the steps since the one it holds or by their sum.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from dare_agg.codec.derive import derive_key
from dare_agg.codec.mask import DropRate
from dare_agg.errors import ConfigError
from dare_agg.rounds.arrivals import Event
from dare_agg.rounds.staleness import StalenessRule, staleness_rule

T = TypeVar("T")
MOST_UPDATES = 1 << 14
MOST_STALENESS = 1 << 16
# Draws of a rank before the free ones are listed.
_DRAWS = 16


@dataclass(frozen=True)
class BufferSettings:
    """How an asynchronous run is set; checked when made.

    ``size`` is K, ``staleness`` a rule as in a run config, ``max_staleness`` the largest τ that
    counts. Whoever drives the run keeps its record and the updates that wait to be merged in the
    folder ``record`` ("": nowhere), and follows the record ``arrivals`` (a file; "": none).

    Raises `ConfigError` for what is out of bounds, and for a rule that gives an update that counts
    nothing.
    """

    size: int
    staleness: str = "sqrt"
    max_staleness: int = 20
    record: str | os.PathLike[str] = ""
    arrivals: str | os.PathLike[str] = ""

    def __post_init__(self) -> None:
        for word, value, least, most in (
            ("buffer", self.size, 1, MOST_UPDATES),
            ("max-staleness", self.max_staleness, 0, MOST_STALENESS),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise ConfigError(
                    f"{word} = {value!r}; an integer from {least} to {most} is needed"
                )
        self.rule.check(self.max_staleness)

    @property
    def rule(self) -> StalenessRule:
        """The staleness rule."""
        return staleness_rule(self.staleness)

    def check_clients(self, clients: int, remedy: str) -> None:
        """Raise `ConfigError` where so few clients never fill a buffer."""
        if clients < self.size:
            raise ConfigError(
                f"buffer = {self.size} with {clients} clients: each is in a buffer at most once, "
                f"which is never full; {remedy}"
            )


@dataclass(frozen=True)
class Ticket:
    """A plan that was dealt: the ``number`` of its asking, whom, and at how many merges.

    ``rank`` is its mask's; with ``apart`` it is the only one of its rank in a buffer. ``stride``
    tells drop rates apart.
    """

    number: int
    client: str
    version: int
    stride: tuple[int, int]
    rank: int
    apart: bool


@dataclass(frozen=True)
class Entry(Generic[T]):
    """An update that counts, with its ticket."""

    ticket: Ticket
    update: T
    digest: bytes = b""


@dataclass(frozen=True)
class Answered:
    """What became of an answer: ``reason`` is None where it counts, else a row of `REASONS`."""

    ticket: Ticket | None
    reason: str | None = None
    detail: str = ""


@dataclass
class Buffer(Generic[T]):
    """The open buffer of a run; ``secret`` is the run's. See the module's text.

    ``ranked`` is false where updates have no ranks to be told apart by (`has_ranks`). ``tell`` is
    called with each `Event`, in order. ``counts`` are the events since the last merge, by kind and
    reason.
    """

    settings: BufferSettings
    secret: bytes = field(repr=False)
    ranked: bool = True
    tell: Callable[[Event], None] | None = None
    merges: int = 0
    asked: int = 0
    in_flight: dict[int, Ticket] = field(default_factory=dict)
    held: dict[int, Entry[T]] = field(default_factory=dict)
    waiting: dict[int, Entry[T]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    # Clients with a plan in flight, with an update in the open buffer, with some that wait.
    _training: set[str] = field(default_factory=set)
    _inside: set[str] = field(default_factory=set)
    _waits: Counter[str] = field(default_factory=Counter)
    _resting: set[str] = field(default_factory=set)
    # Of the last two versions, the newest last: how many open plans have a rank, by stride.
    _ranks: list[dict[tuple[int, int], Counter[int]]] = field(default_factory=lambda: [{}, {}])
    # Plans of the newest version, by stride.
    _dealt: Counter[tuple[int, int]] = field(default_factory=Counter)

    @property
    def full(self) -> bool:
        """Whether the open buffer is to be merged."""
        return len(self.held) >= self.settings.size

    def is_free(self, client: str) -> bool:
        """Whether a client may be asked: it has no plan and is not in the buffer, nor rests."""
        busy = client in self._training or client in self._inside or self._waits[client] > 1
        return not busy and client not in self._resting

    def rests(self, client: str) -> bool:
        """Whether a client is kept from being asked by nothing but its last answer."""
        return client in self._resting and client not in self._training

    def staleness(self, ticket: Ticket) -> int:
        """τ of an update of this ticket in the open buffer."""
        return self.merges - ticket.version

    # --- out and in ------------------------------------------------------------------------

    def ask(self, client: str, rate: DropRate) -> Ticket:
        """Deal a client its next plan, of this drop rate; `ConfigError` for one that is not free.

        >>> buffer = Buffer(BufferSettings(size=1), bytes(32))
        >>> buffer.ask("a", DropRate(10, 1)).number, buffer.is_free("a")
        (0, False)
        """
        if not self.is_free(client):
            raise ConfigError(
                f"client {client!r} has an open plan or rests until the next merge; ask another"
            )
        stride = (rate.numerator, rate.denominator)
        parts = stride[0] // stride[1]
        apart = self.ranked and parts > 1 and 2 * self.settings.size <= parts
        rank = self._drawn_rank(stride, parts) if apart else self._dealt[stride]
        ticket = Ticket(self.asked, client, self.merges, stride, rank, apart)
        self.asked += 1
        self._dealt[stride] += 1
        self._count_rank(ticket, 1)
        self.in_flight[ticket.number] = ticket
        self._training.add(client)
        self._note("ask", ticket)
        return ticket

    def answer(self, number: int, update: T, digest: bytes = b"") -> Answered:
        """Take the answer to plan ``number``; what is told by ``digest`` is the same answer."""
        if number not in self.in_flight:
            return self._unexpected(number, digest)
        ticket = self._taken(number)
        assert ticket is not None
        age = self.staleness(ticket)
        if age > self.settings.max_staleness:
            return self._left_out(ticket, reason="stale", detail=self._too_old(age))
        self._put(Entry(ticket, update, digest))
        self.counts["waits"] += number in self.waiting
        self._note("answer", ticket)
        return Answered(ticket)

    def lose(self, number: int, reason: str = "lost", *, rest: bool = True) -> None:
        """Close plan ``number``, of which no answer that counts came; its client rests.

        Without ``rest`` it may be asked again at once. An answer that was taken counts no more;
        nothing happens where the plan is closed.
        """
        if (ticket := self._taken(number)) is not None:
            self._left_out(ticket, reason=reason, rest=rest)

    def flush(self) -> tuple[list[Entry[T]], list[Answered]]:
        """Empty the buffer for a merge: its updates in the order of asking, and who was too old.

        Those that waited move up; those of them that are too old now do not count.
        """
        entries = [self.held[number] for number in sorted(self.held)]
        for entry in entries:
            self._taken(entry.ticket.number)
            self._count_rank(entry.ticket, -1)
        self.merges += 1
        self._ranks = [self._ranks[1], {}]
        self._dealt.clear()
        self.counts.clear()
        self._resting.clear()
        if self.tell is not None:
            self.tell(Event("merge", self.merges))
        late = []
        for entry in list(self.waiting.values()):
            self._taken(entry.ticket.number)
            age = self.staleness(entry.ticket)
            if age > self.settings.max_staleness:
                late.append(self._left_out(entry.ticket, reason="stale", detail=self._too_old(age)))
            else:
                self._put(entry)
        return entries, late

    def rest_over(self) -> None:
        """Free those who rest, without a merge: whoever drives found that nobody is left."""
        self._resting.clear()

    def take_up(self, entries: list[Entry[T]]) -> None:
        """Go on with updates that were accepted before a restart, in the order of their arrival."""
        for entry in entries:
            self._count_rank(entry.ticket, 1)
            self._put(entry)

    # --- inside ----------------------------------------------------------------------------

    def _put(self, entry: Entry[T]) -> None:
        """Put an update into the open buffer, or where it waits for the next one."""
        ticket = entry.ticket
        met = (other.ticket for other in self.held.values())
        same = ticket.apart and any((o.stride, o.rank) == (ticket.stride, ticket.rank) for o in met)
        if self.full or same or ticket.client in self._inside:
            self.waiting[ticket.number] = entry
            self._waits[ticket.client] += 1
        else:
            self.held[ticket.number] = entry
            self._inside.add(ticket.client)

    def _taken(self, number: int) -> Ticket | None:
        """Take a plan out of where it is; None where it is closed."""
        if (ticket := self.in_flight.pop(number, None)) is not None:
            self._training.discard(ticket.client)
            return ticket
        if (entry := self.held.pop(number, None)) is not None:
            self._inside.discard(entry.ticket.client)
            return entry.ticket
        if (entry := self.waiting.pop(number, None)) is not None:
            self._waits -= Counter([entry.ticket.client])
            return entry.ticket
        return None

    def _drawn_rank(self, stride: tuple[int, int], parts: int) -> int:
        taken = [ranks[stride] for ranks in self._ranks if stride in ranks]
        inside = (entry.ticket for entry in self.held.values())
        taken.append(Counter(ticket.rank for ticket in inside if ticket.stride == stride))
        drawn = 0
        for draw in range(_DRAWS):
            key = derive_key(self.secret, "buffer-rank", self.asked, draw)
            drawn = int.from_bytes(key[:8], "little")
            if not any(drawn % parts in ranks for ranks in taken):
                return drawn % parts
        free = [rank for rank in range(parts) if not any(rank in ranks for ranks in taken)]
        return free[drawn % len(free)] if free else drawn % parts

    def _unexpected(self, number: int, digest: bytes) -> Answered:
        """An answer to a plan that is not in flight."""
        before = self.held.get(number) or self.waiting.get(number)
        if before is not None and before.digest == digest:
            self.counts["duplicate"] += 1
            same = "the same answer a second time"
            return Answered(before.ticket, reason="duplicate", detail=same)
        if before is not None:
            self.lose(number, reason="duplicate")
            why = "two different answers to one plan; both dropped"
            return Answered(before.ticket, reason="duplicate", detail=why)
        if 0 <= number < self.asked:
            self.counts["late"] += 1
            why = f"plan {number} is closed: it was merged, lost or given up before"
            return Answered(None, reason="late", detail=why)
        self.counts["unknown-node"] += 1
        why = f"plan {number} was dealt to nobody"
        return Answered(None, reason="unknown-node", detail=why)

    def _too_old(self, age: int) -> str:
        return (
            f"its version is {age} merges old, and at most {self.settings.max_staleness} count; "
            "its next order brings it to the newest version, from which it goes on"
        )

    def _left_out(
        self, ticket: Ticket, *, reason: str, detail: str = "", rest: bool = True
    ) -> Answered:
        self._count_rank(ticket, -1)
        if rest and reason != "stale":  # who was slow did nothing wrong
            self._resting.add(ticket.client)
        self._note("lost", ticket, reason)
        return Answered(ticket, reason, detail)

    def _count_rank(self, ticket: Ticket, by: int) -> None:
        """Count an open plan's rank among those of its version, or no more."""
        age = self.merges - ticket.version
        if ticket.apart and age < len(self._ranks):
            ranks = self._ranks[-1 - age].setdefault(ticket.stride, Counter())
            ranks[ticket.rank] += by
            if not ranks[ticket.rank]:
                del ranks[ticket.rank]

    def _note(self, kind: str, ticket: Ticket, why: str = "") -> None:
        self.counts[why or kind] += 1
        if self.tell is not None:
            self.tell(Event(kind, ticket.number, ticket.client, ticket.version, why))

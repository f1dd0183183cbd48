"""The buffer of an asynchronous run: who is in it, its masks, its age, and the same bits again."""

from __future__ import annotations

import heapq
import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dare_agg.codec.budget import ClientTerms
from dare_agg.codec.derive import derive_key
from dare_agg.codec.mask import DropRate, parse_drop_rate
from dare_agg.downlink.base import STEPS
from dare_agg.downlink.client import VersionReceiver
from dare_agg.downlink.server import VersionDownlink
from dare_agg.downlink.steps import families_of
from dare_agg.errors import REASONS, ConfigError, RunError, StateError
from dare_agg.robust.rule import robust_rule
from dare_agg.rounds.adapters import merge_products
from dare_agg.rounds.arrivals import Event, Record, Replay, read_events
from dare_agg.rounds.buffer import Buffer, BufferSettings
from dare_agg.rounds.buffered import buffered_plan, check_buffered, has_ranks, merged_masks
from dare_agg.rounds.chain import StepContext, chain
from dare_agg.rounds.client import make_client_update
from dare_agg.rounds.draws import round_secret, run_secret
from dare_agg.rounds.robust import robust_step
from dare_agg.rounds.server import Accepted, advance, check_reply, merge_round
from dare_agg.rounds.settings import FederatedSettings
from dare_agg.rounds.staleness import STALENESS, staleness_rule, staleness_step
from dare_agg.rounds.step import StepState
from dare_agg.rounds.terms import UpdateTerms
from dare_agg.rounds.weight_bound import bound_step
from dare_agg.vectors.model import global_model

SECRET = run_secret(7)
TENTH = parse_drop_rate("0.9")


class Run:
    """An asynchronous run of a toy model: ``seconds`` are those that each client trains."""

    def __init__(
        self, seconds, size=3, p="0.9", values="b1", robust=None, threads=1, replay=None,
        downlink=None, liars=(), **words,
    ):  # fmt: skip
        terms = UpdateTerms(drop_rate=p, values=values, dense=("head",))
        self.settings = FederatedSettings(terms, threads=threads, tile=512, robust=robust)
        self.buffer = Buffer(BufferSettings(size, **words), SECRET, has_ranks(self.settings))
        self.events: list[Event] = []
        self.buffer.tell = self.note
        self.replay = Replay(replay) if replay is not None else None
        rng = np.random.default_rng(1)
        base = {"w": rng.normal(size=(90, 40)), "head": rng.normal(size=7)}
        model = global_model(
            {name: array.astype(np.float32) for name, array in base.items()}, dense=("head",)
        )
        self.downlink = downlink or VersionDownlink("union-b1")
        self.model = self.downlink.start(model)
        self.state, self.seconds, self.liars = StepState(), dict(seconds), set(liars)
        self.models = {0: self.model}
        self.plans, self.merged, self.queue = {}, [], []
        self.clock = 0.0

    def note(self, event):
        self.events.append(event)
        if self.replay is not None:
            self.replay.follow(event)

    def ask(self, client):
        ticket = self.buffer.ask(client, self.settings.terms.drop_rate)
        plan = buffered_plan(
            SECRET, ticket, self.settings.terms, self.model.ref,
            shared_mask=self.settings.shared_mask, layout=self.model.groups.layout,
        )  # fmt: skip
        self.plans[ticket.number] = plan
        heapq.heappush(self.queue, (self.clock + self.seconds[client], ticket.number, client))

    def answered(self, number, client):
        """The client's own half: what it learned from the version that it was given."""
        plan = self.plans[number]
        version = self.models[plan.round - 1]
        rng = np.random.default_rng([number, len(client)])
        sign = -30 if client in self.liars else 1
        tuned = {
            name: array + np.float32(sign) * rng.normal(0.01, 0.01, array.shape).astype(np.float32)
            for name, array in version.arrays().items()
        }
        update = make_client_update(plan, version.arrays(), tuned)
        reply = check_reply(plan, update.blob, update.dense_blob, 10 + len(client))
        assert isinstance(reply, Accepted), reply
        return reply

    def step(self):
        """The next event, as a server meets it."""
        if self.buffer.full:
            return self.merge()
        for client in sorted(self.seconds):
            if self.buffer.is_free(client):
                self.ask(client)
        self.clock, number, client = heapq.heappop(self.queue)
        self.buffer.answer(number, self.answered(number, client))

    def follow(self):
        """The next event of the record, whatever the speeds are."""
        due = self.replay.next
        if due.kind == "ask":
            self.ask(due.client)
        elif due.kind == "answer":
            self.buffer.answer(due.number, self.answered(due.number, due.client))
        elif due.kind == "lost":
            self.buffer.lose(due.number, due.why)
        else:
            self.merge()

    def merge(self):
        entries, _ = self.buffer.flush()
        number = self.buffer.merges
        key = derive_key(round_secret(SECRET, number), "steps", length=32)
        names = {entry.ticket.number: entry.ticket.client for entry in entries}
        context = StepContext(self.model, self.settings, number, key, names)
        rule = self.settings.robust
        steps = (staleness_step(self.buffer.settings.rule), bound_step)
        passing = chain(*steps, *([robust_step(rule)] if rule else []))
        passed = passing([entry.update for entry in entries], context)
        merged = merge_round(self.model, passed.accepted, self.settings)
        masks = merged_masks([entry.update.plan for entry in entries], number)
        self.model, self.state = advance(
            self.model, self.state, merged, self.settings, self.downlink, masks
        )
        self.models[number] = self.model
        self.merged.append((entries, passed, merged))

    def go(self, merges):
        while self.buffer.merges < merges:
            self.step()
        return self


# One in three is ten times slower.
SPEEDS = {str(place): 10.0 + place if place % 3 == 2 else 1.0 + place / 100 for place in range(10)}


def test_slow_clients_are_waited_for_by_nobody_and_count_by_their_age():
    run = Run(SPEEDS, size=5).go(20)
    # In rounds of all clients 20 of them take 20 times the slowest.
    assert run.clock < 20 * 18 / 2.5
    taus = [passed.measurements[0]["staleness"] for _, passed, _ in run.merged]
    slow = [
        tau
        for (entries, _, _), of in zip(run.merged, taus, strict=True)
        for entry, tau in zip(entries, of, strict=True)
        if int(entry.ticket.client) % 3 == 2
    ]
    assert slow and min(slow) > 3
    assert max(map(max, taus)) <= 20
    for entries, passed, _ in run.merged:
        told = passed.measurements[0]
        assert len(entries) == 5
        assert told["factors"] == [staleness_rule("sqrt").factor(tau) for tau in told["staleness"]]


def test_an_update_counts_for_its_part_of_the_mean_times_its_age():
    run = Run(SPEEDS, size=5, values="f32").go(12)
    for entries, passed, merged in run.merged:
        weights = np.array([entry.update.weight for entry in entries])
        factors = np.array(passed.measurements[0]["factors"])
        expected = np.zeros(run.model.delta.size)
        for entry, share in zip(entries, weights / weights.sum() * factors, strict=True):
            one = np.zeros(run.model.delta.size, np.float32)
            entry.update.update.read(0, one.size, one)
            expected += share * one
        np.testing.assert_allclose(merged.delta, expected, atol=2e-7)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_masks_of_a_buffer_are_disjoint_over_versions(size):
    run = Run(SPEEDS, size=size).go(15)
    versions = set()
    for entries, _, _ in run.merged:
        plans = [entry.update.plan for entry in entries]
        versions.add(len({plan.round for plan in plans}))
        at = [set(plan.spec().draw_mask().indices(0, plan.model.size)) for plan in plans]
        assert not any(a & b for a, b in itertools.combinations(at, 2))
        assert len({entry.ticket.client for entry in entries}) == size
        # The union is named by one key, and all that moves lies on it.
        assert len({family.key for family in families_of(plans)}) == 1
    assert size == 1 or max(versions) > 1


def test_every_part_is_sent_as_often_as_every_other():
    buffer, queue = Buffer(BufferSettings(5), SECRET), []
    sent = np.zeros(10)
    while buffer.merges < 400:
        for client in filter(buffer.is_free, SPEEDS):
            ticket = buffer.ask(client, TENTH)
            heapq.heappush(queue, (buffer.merges + SPEEDS[client], ticket.number))
        buffer.answer(heapq.heappop(queue)[1], None)
        if buffer.full:
            for entry in buffer.flush()[0]:
                sent[entry.ticket.rank] += 1
    # 2000 updates of one part in ten; of draws with no regard to others 13.4 is the deviation.
    assert sent.sum() == 2000 and abs(sent - 200).max() < 40


def test_ranks_of_a_large_buffer_are_counted_through_by_version():
    run = Run(SPEEDS, size=8).go(6)
    seen = set()
    for plan in run.plans.values():
        at = (plan.round, plan.mask_key, plan.rank)
        assert at not in seen and plan.rank < 10
        seen.add(at)
    first = [plan for plan in run.plans.values() if plan.round == 1]
    assert sorted(plan.rank for plan in first) == list(range(10))
    # The eleventh of a version has another key.
    buffer = Buffer(BufferSettings(8), SECRET)
    plans = [
        buffered_plan(SECRET, buffer.ask(str(place), TENTH), run.settings.terms, run.model.ref)
        for place in range(11)
    ]
    assert plans[10].rank == 0 and plans[10].mask_key != plans[0].mask_key


def test_no_two_plans_have_the_same_keys():
    run = Run(SPEEDS, size=5).go(20)
    plans = list(run.plans.values())
    assert len({plan.values_key for plan in plans}) == len(plans)
    assert len({plan.dense_values_key for plan in plans}) == len(plans)
    assert len({plan.digest() for plan in plans}) == len(plans)


@pytest.mark.parametrize("size", [3, 5, 8])
def test_the_record_of_arrivals_makes_the_same_bits_at_other_speeds(size):
    first = Run(SPEEDS, size=size).go(14)
    others = dict.fromkeys(SPEEDS, 1.0)
    again = Run(others, size=size, replay=first.events, threads=3)
    while again.replay.next is not None:
        again.follow()
    assert again.events == first.events
    assert again.model.ref.version == first.model.ref.version
    # And without the record, at these speeds, they are others.
    assert Run(others, size=size).go(14).model.ref.version != first.model.ref.version


def test_a_run_that_leaves_its_record_says_where():
    first = Run(SPEEDS, size=3).go(4)
    again = Run(SPEEDS, size=3, replay=first.events)
    again.follow()
    with pytest.raises(RunError, match=r"event 2 of the record is .*\"ask\".*; give those of"):
        again.ask("9")


def test_a_client_that_comes_back_follows_in_one_step(tmp_path):
    downlink = VersionDownlink("union-b1")
    run = Run(SPEEDS, size=5, downlink=downlink)
    receiver = VersionReceiver(tmp_path, "a", downlink.base_version, dense=("head",))
    base = run.model.arrays()
    assert receiver.adopt(base)
    run.go(3)
    for merges in (4, 17, 18):
        have = receiver.have()
        run.go(merges)
        sent = downlink.broadcast(run.model, have)
        assert not sent.full and len(sent.payloads[STEPS]) > 0
        found = receiver.receive(run.model.ref.version, sent.payloads, None)
        for name, array in run.model.arrays().items():
            np.testing.assert_array_equal(found[name], array)


# --- what does not count -------------------------------------------------------------------


def test_an_update_that_is_too_old_is_left_out_and_its_client_goes_on():
    run = Run({"slow": 100.0, **{str(place): 1.0 for place in range(4)}}, size=4, max_staleness=3)
    while run.buffer.merges < 5:
        run.step()
    number, ticket = next((n, t) for n, t in run.buffer.in_flight.items() if t.client == "slow")
    assert run.buffer.staleness(ticket) == 5
    answered = run.buffer.answer(number, run.answered(number, "slow"))
    assert answered.reason == "stale" and answered.reason in REASONS
    assert "5 merges old, and at most 3 count; its next order brings it" in answered.detail
    assert run.buffer.counts["stale"] == 1
    assert run.events[-1] == Event("lost", number, "slow", 0, "stale")
    assert run.buffer.is_free("slow")
    # From the newest version what it learns counts again.
    ticket = run.buffer.ask("slow", TENTH)
    assert ticket.version == 5 and run.buffer.staleness(ticket) == 0


def test_two_answers_of_one_client():
    buffer = Buffer(BufferSettings(3), SECRET)
    for client in "abc":
        buffer.ask(client, TENTH)
    with pytest.raises(ConfigError, match=r"'a' has an open plan"):
        buffer.ask("a", TENTH)
    assert not buffer.answer(0, "first", b"1").reason
    with pytest.raises(ConfigError, match=r"'a' has an open plan"):  # it is in the buffer
        buffer.ask("a", TENTH)
    # The same again is one answer; another one takes both away.
    assert buffer.answer(0, "first", b"1").reason == "duplicate"
    assert set(buffer.held) == {0}
    again = buffer.answer(0, "second", b"2")
    assert again.reason == "duplicate" and "both dropped" in again.detail
    assert not buffer.held and not buffer.is_free("a")
    assert buffer.counts["duplicate"] == 2
    assert buffer.answer(0, "third", b"3").reason == "late"
    assert buffer.answer(99, "who", b"").reason == "unknown-node"
    # Whoever fails rests until the next merge.
    buffer.lose(1, "non-finite")
    assert not buffer.is_free("b")
    buffer.rest_over()
    assert buffer.is_free("b") and buffer.is_free("a")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"size": 0}, "buffer = 0; an integer from 1"),
        ({"size": True}, "buffer = True"),
        ({"size": 2, "max_staleness": -1}, "max-staleness = -1"),
        ({"size": 2, "staleness": "square"}, "did you mean 'sqrt'"),
        ({"size": 2, "staleness": "sqrt(a=1)"}, "no number 'a'; it has none"),
        ({"size": 2, "staleness": "polynomial(a=-1)"}, "at least 0"),
        ({"size": 2, "staleness": "polynomial(b=1)"}, "did you mean|known: a"),
        ({"size": 2, "staleness": "linear(over=10)"}, r"10 merges old nothing.*max-staleness to 9"),
        ({"size": 2, "staleness": "linear(over=0)"}, "0 merges old nothing"),
        ({"size": 2, "staleness": "polynomial(a=99)"}, "1 merges old nothing.*max-staleness to 0"),
        ({"size": 2, "staleness": "hinge(a=1e9)"}, "3 merges old nothing"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(words, said):
    with pytest.raises(ConfigError, match=said):
        BufferSettings(**words)


def test_more_updates_than_clients():
    BufferSettings(10).check_clients(10, "")
    with pytest.raises(ConfigError, match=r"buffer = 11 with 10 clients: .* never full; lower it"):
        BufferSettings(11).check_clients(10, "lower it")


def test_intervals_count_for_as_long_as_a_client_was_away():
    rule = staleness_rule("interval(most=4)")
    assert [rule.factor(tau) for tau in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    # Who comes in each of four merges and who comes in the fourth alone have weighed the same.
    assert 4 * rule.factor(0) == rule.factor(3)
    with pytest.raises(ConfigError, match="0 merges old nothing"):
        BufferSettings(2, staleness="interval(most=0)")


@pytest.mark.parametrize("name", [name for name in STALENESS if name != "interval"])
def test_a_rule_never_gives_more_than_a_fresh_update_has(name):
    rule = staleness_rule(name)
    factors = [rule.factor(tau) for tau in range(21)]
    assert factors[0] == 1 and all(0 < b <= a for a, b in itertools.pairwise(factors))
    assert all(factor * (1 << 20) == int(factor * (1 << 20)) for factor in factors)
    assert str(staleness_rule(str(rule))) == str(rule)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"method": "fisher"}, "fisher statistics"),
        ({"method": "wudi"}, "directions"),
        ({"terms": UpdateTerms(keep_rates="last")}, "told anew with each"),
        ({"robust": robust_rule("nnm+trimmed-mean", 1)}, "set drop_rate 0"),
    ],
    ids=str,
)
def test_what_a_buffer_cannot_be_merged_by(words, said):
    found = FederatedSettings(**words)
    with pytest.raises(ConfigError, match=said):
        check_buffered(found, BufferSettings(5), drop_rate=found.terms.drop_rate)


def test_products_and_too_few_for_a_rule():
    plain = FederatedSettings()
    with pytest.raises(ConfigError, match="merge their factors"):
        check_buffered(plain, BufferSettings(5), steps=(merge_products,))
    check_buffered(plain, BufferSettings(5))
    bounded = FederatedSettings(robust=robust_rule("norm-bound", 2))
    check_buffered(bounded, BufferSettings(5), drop_rate=TENTH)
    voted = FederatedSettings(robust=robust_rule("nnm+trimmed-mean", 2))
    with pytest.raises(ConfigError, match="raise buffer"):
        check_buffered(voted, BufferSettings(3), drop_rate=parse_drop_rate(0))
    ticket = Buffer(BufferSettings(5), SECRET, False).ask("a", TENTH)
    with pytest.raises(ConfigError, match="give all clients drop_rate 0"):
        run = Run(SPEEDS)
        own = ClientTerms(TENTH, "b1")
        buffered_plan(SECRET, ticket, UpdateTerms(), run.model.ref, own, shared_mask=True)


# --- robust rules --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "p"), [("norm-bound", "0.9"), ("nnm+trimmed-mean", 0), ("norm-bound+median", 0)]
)
def test_robust_rules_bear_liars_in_a_buffer(text, p):
    words = {"size": 5, "p": p, "values": "f32" if p == 0 else "b1"}
    plain = Run(SPEEDS, liars={"3"}, **words).go(12)
    guarded = Run(SPEEDS, liars={"3"}, robust=robust_rule(text, 1), **words).go(12)
    start, honest = guarded.models[0].delta[:], Run(SPEEDS, **words).go(12).model.delta[:]
    moved = np.linalg.norm(guarded.model.delta[:] - honest)
    harmed = np.linalg.norm(plain.model.delta[:] - honest)
    assert moved < harmed / 4
    assert np.linalg.norm(guarded.model.delta[:] - start) > 0
    told = guarded.merged[-1][1].measurements[-1]["robust"]
    assert told["byzantine"] == 1 and len(told["clients"]) == 5


# --- properties ----------------------------------------------------------------------------

RATES = (TENTH, parse_drop_rate("0.5"), DropRate(1, 1), DropRate(100, 1))
DOING = st.lists(st.tuples(st.sampled_from("aaaalw"), st.integers(0, 7)), max_size=120)


@settings(max_examples=60, deadline=None)
@given(DOING, st.integers(1, 6), st.integers(0, 4))
def test_whatever_comes_a_buffer_keeps_its_word(doing, size, most):
    """Any order of asking, answering and losing: K updates, each client once, ranks apart."""
    events = []
    buffer = Buffer(BufferSettings(size, max_staleness=most), SECRET, tell=events.append)
    merged = 0
    for what, place in doing:
        client = f"c{place}"
        if what == "a" and buffer.is_free(client):
            buffer.ask(client, RATES[place % len(RATES)])
        elif buffer.in_flight:
            number = sorted(buffer.in_flight)[place % len(buffer.in_flight)]
            if what == "l":
                buffer.lose(number)
            else:
                buffer.answer(number, number)
        elif what == "l":
            buffer.rest_over()
        if buffer.full:
            held = buffer.merges
            entries, late = buffer.flush()
            merged += len(entries)
            tickets = [entry.ticket for entry in entries]
            assert len(tickets) == size and buffer.merges == held + 1
            assert len({ticket.client for ticket in tickets}) == size
            ranks = [(t.stride, t.rank) for t in tickets if t.apart]
            assert len(set(ranks)) == len(ranks)
            assert all(held - ticket.version <= most for ticket in tickets)
            assert all(one.reason == "stale" for one in late)
    # Every plan is open, merged or lost, and none twice.
    asked = [event.number for event in events if event.kind == "ask"]
    lost = [event.number for event in events if event.kind == "lost"]
    open_now = [*buffer.in_flight, *buffer.held, *buffer.waiting]
    assert asked == list(range(buffer.asked))
    assert len(lost) + len(open_now) + merged == buffer.asked
    assert len(set(lost)) == len(lost) and not set(lost) & set(open_now)


def test_updates_that_were_accepted_are_taken_up_after_a_restart():
    run = Run(SPEEDS, size=5).go(7)
    while len(run.buffer.held) < 3 or not run.buffer.in_flight:
        run.step()
    kept = [*run.buffer.held.values(), *run.buffer.waiting.values()]
    after = Buffer(BufferSettings(5), SECRET, merges=7, asked=run.buffer.asked)
    after.take_up(kept)
    assert list(after.held) == list(run.buffer.held)
    for client in SPEEDS:
        held = client in {entry.ticket.client for entry in kept}
        assert after.is_free(client) is not held
    again = Buffer(BufferSettings(1), SECRET, merges=7, asked=run.buffer.asked)
    again.take_up(kept)  # of fewer updates: the others wait
    assert again.full and len(again.waiting) == len(kept) - 1


# --- the record on disk --------------------------------------------------------------------


def test_the_record_is_read_as_it_was_written(tmp_path: Path):
    path = tmp_path / "buffer" / "arrivals.jsonl"
    record = Record(path)
    record.begin()
    events = Run(SPEEDS, size=3).go(3).events
    for event in events:
        record.add(event)
    assert read_events(path) == events
    with path.open("ab") as file:  # a crash in the middle of a line
        file.write(b'{"kind": "ask", "num')
    assert read_events(path) == events
    record.begin(events[:4])
    assert read_events(path) == events[:4]


@pytest.mark.parametrize(
    "line",
    [
        b"[]", b'{"kind": "ask"}', b'{"kind": "go", "number": 1}', b'{"kind": "ask", "number": -1}',
        b'{"kind": "ask", "number": true}', b'{"kind": "ask", "number": 1, "client": 3}',
        b'{"kind": [], "number": 1}', b"\xff", b'{"kind": "ask", "number": 1, "version": 1.5}',
    ],
    ids=repr,
)  # fmt: skip
def test_a_record_is_not_trusted(tmp_path, line):
    path = tmp_path / "arrivals.jsonl"
    path.write_bytes(b'{"kind": "ask", "number": 0, "client": "a"}\n' + line + b"\n")
    with pytest.raises(StateError, match="line 2 is no event of a run"):
        read_events(path)
    with pytest.raises(StateError, match="cannot be read"):
        read_events(tmp_path / "none")

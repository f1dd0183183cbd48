"""A buffer over Flower: merges that wait for nobody, their record, resume, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import time

import numpy as np
import pytest
from flwr.app import Message
from strategy_runs import gone, is_train
from toy import numpy_of

from dare_agg.codec.budget import UploadBudget
from dare_agg.deploy.identities import make_identity
from dare_agg.downlink.ways import make_downlink
from dare_agg.errors import ConfigError, RunError, StateError
from dare_agg.flower import DareStrategy, dare
from dare_agg.flower.records import ORDER_KEY, read_config
from dare_agg.flower.resume import keep_base, resume, save
from dare_agg.privacy.clients import ClientPrivacy
from dare_agg.rounds.adapters import merge_products
from dare_agg.rounds.arrivals import Event, Record, read_events
from dare_agg.rounds.buffer import BufferSettings
from dare_agg.rounds.state import StateFolder
from simulations.runs.memory_grid import MemoryGrid

CLIENTS = 6


class SlowGrid(MemoryGrid):
    """Clients of these partitions answer once so many others did, or there are no others."""

    def __init__(self, *args, slow=(2, 5), times=8, **words):
        super().__init__(*args, **words)
        self.slow, self.times, self.answered = set(slow), times, 0
        self.due, self.fast, self.last = {}, set(), time.monotonic()

    def push_messages(self, messages):
        messages = list(messages)
        ids = super().push_messages(messages)
        for message_id, message in zip(ids, messages, strict=True):
            if is_asked(message):
                if self.partitions[message.metadata.dst_node_id] in self.slow:
                    self.due[message_id] = self.answered + self.times
                else:
                    self.fast.add(message_id)
        return ids

    def pull_messages(self, message_ids):
        alone = not self.fast and time.monotonic() > self.last + 0.3
        ready = [one for one in message_ids if alone or self.due.get(one, 0) <= self.answered]
        found = super().pull_messages(ready)
        for reply in found:
            self.fast.discard(reply.metadata.reply_to_message_id)
            self.answered, self.last = self.answered + is_train(reply), time.monotonic()
        return found


def is_asked(message: Message) -> bool:
    order = read_config(message.content, ORDER_KEY)
    return order is not None and order.get("ask") == "train"


def go(grid, toys, merges=6, size=3, folder=None, arrivals="", downlink="auto", **words):
    """A run of so many merges; returns its strategy and outcomes."""
    outcomes = []
    buffer = {"size": size, "record": folder or "", "arrivals": arrivals}
    buffer |= {name: words.pop(name) for name in ("staleness", "max_staleness") if name in words}
    words = {"drop_rate": 0.9, "dense": ["head"], "fraction_evaluate": 0.0, "seed": 7, **words}
    strategy = DareStrategy(
        min_available_nodes=CLIENTS, downlink=make_downlink(downlink),
        round_hook=lambda outcome: outcomes.append(outcome),
        buffer=BufferSettings(**buffer), **words,
    )  # fmt: skip
    strategy.start(grid, toys.record(toys.arrays()), num_rounds=merges, timeout=60)
    return strategy, outcomes


@pytest.mark.parametrize("downlink", ["auto", "full"])
def test_merges_wait_for_nobody(toys, downlink):
    strategy, outcomes = go(SlowGrid(toys.app(), CLIENTS), toys, 8, downlink=downlink)
    told = [outcome.measurements for outcome in outcomes]
    assert len(told) == 8
    assert all(one["accepted"] == 3 and len(set(one["clients"])) == 3 for one in told)
    taus = [tau for one in told for tau in one["buffer"]["staleness"]]
    assert max(taus) > 1
    merged = [name for one in told for name in one["clients"]]
    assert {"2", "5"} <= set(merged) and merged.count("2") < merged.count("0")
    for one in told:
        factors = [round((1 + tau) ** -0.5 * 2**20) / 2**20 for tau in one["buffer"]["staleness"]]
        assert one["steps"][0]["factors"] == factors
    assert len({outcome.model.ref.version for outcome in outcomes}) == 8
    assert strategy.broadcasting.model.ref.version == outcomes[-1].model.ref.version


def test_a_client_that_comes_back_is_sent_steps_alone(toys):
    grid = SlowGrid(toys.app(), CLIENTS)
    strategy, _ = go(grid, toys, 8, downlink="auto")
    late = [m for m in grid.sent if is_asked(m) and grid.partitions[m.metadata.dst_node_id] == 2]
    assert len(late) > 1
    assert "arrays" not in late[-1].content and "dare.down.base" not in late[-1].content
    assert "dare.down.steps" in late[-1].content
    # The parts of one cut: every step is named by one key.
    assert all(len({family.key for family in step.head.families}) == 1
               for step in strategy.downlink.steps)  # fmt: skip


def test_the_record_makes_the_same_bits_at_other_speeds(toys, tmp_path):
    first, outcomes = go(
        SlowGrid(toys.app(), CLIENTS), toys, 7, folder=tmp_path / "a", server_step="momentum"
    )
    path = tmp_path / "a" / "arrivals.jsonl"
    events = read_events(path)
    assert sum(event.kind == "merge" for event in events) == 7
    again, others = go(
        MemoryGrid(toys.app(), CLIENTS, shuffle=3), toys, 7, folder=tmp_path / "b",
        arrivals=path, server_step="momentum", threads=3,
    )  # fmt: skip
    assert [one.model.ref.version for one in others] == [one.model.ref.version for one in outcomes]
    assert again.step_state.vectors.keys() == first.step_state.vectors.keys()
    followed = read_events(tmp_path / "b" / "arrivals.jsonl")
    assert followed[: len(events)] == events
    # Past its end the run goes on by itself.
    _, longer = go(MemoryGrid(toys.app(), CLIENTS), toys, 9, arrivals=path, server_step="momentum")
    assert longer[6].model.ref.version == outcomes[6].model.ref.version and len(longer) == 9


def test_a_record_of_other_clients_is_left_with_a_reason(toys, tmp_path):
    go(SlowGrid(toys.app(), CLIENTS), toys, 3, folder=tmp_path)

    def edit(partition, arrays, metrics):
        if partition == 0:
            arrays["encoder.bias"] = arrays["encoder.bias"] * np.float32("nan")

    with pytest.raises(RunError, match=r"of the record is .* and this run has .*non-finite"):
        go(MemoryGrid(toys.app(edit=edit), CLIENTS), toys, 3, arrivals=tmp_path / "arrivals.jsonl")


# --- what does not count -------------------------------------------------------------------


def test_bad_answers_are_typed_counted_and_told_to_their_client(toys):
    def edit(partition, arrays, metrics):
        if partition == 1:
            metrics["num-examples"] = -4

    grid = SlowGrid(toys.app(edit=edit), CLIENTS)
    _, outcomes = go(grid, toys, 5)
    rejected = [one for outcome in outcomes for one in outcome.measurements["rejected"]]
    assert rejected and {(one["reason"], one["name"]) for one in rejected} == {("weight", "1")}
    # It rests until the next merge, and hears why then.
    assert len(rejected) <= 5
    orders = [
        read_config(message.content, ORDER_KEY).get("not-merged", "")
        for message in grid.sent
        if is_asked(message) and grid.partitions[message.metadata.dst_node_id] == 1
    ]
    assert orders[0] == "" and all(one.startswith("weight: weight -4") for one in orders[1:])
    assert all("1" not in outcome.measurements["clients"] for outcome in outcomes)


def test_an_update_that_is_too_old_is_told_the_way_forward(toys):
    grid = SlowGrid(toys.app(), CLIENTS, times=14)
    _, outcomes = go(grid, toys, 12, max_staleness=2)
    stale = [one for outcome in outcomes for one in outcome.measurements["rejected"]]
    assert stale and {one["reason"] for one in stale} == {"stale"}
    assert {one["name"] for one in stale} <= {"2", "5"}
    assert "and at most 2 count; its next order brings it" in stale[0]["detail"]
    assert sum(outcome.measurements["buffer"]["stale"] for outcome in outcomes) == len(stale)
    told = [
        read_config(message.content, ORDER_KEY).get("not-merged", "")
        for message in grid.sent
        if is_asked(message) and grid.partitions[message.metadata.dst_node_id] in (2, 5)
    ]
    assert any(one.startswith("stale: its version is") for one in told)


def test_a_client_that_is_lost_is_asked_again(toys):
    lost = []

    def tamper(partition, reply):
        if partition == 3 and is_train(reply) and not lost:
            lost.append(partition)
            return gone(reply)
        return reply

    _, outcomes = go(SlowGrid(toys.app(), CLIENTS, tamper=tamper), toys, 6)
    rejected = [one for outcome in outcomes for one in outcome.measurements["rejected"]]
    assert [(one["reason"], one["name"]) for one in rejected] == [("lost", "3")]
    assert any("3" in outcome.measurements["clients"] for outcome in outcomes)


def test_a_client_that_never_answers_has_a_deadline(toys):
    def tamper(partition, reply):
        return None if partition == 4 and is_train(reply) else reply

    found = []

    def until_late(outcome):
        time.sleep(0.3)
        found.extend(outcome.measurements["rejected"])
        assert outcome.measurements["accepted"] == 4
        return bool(found)

    grid = MemoryGrid(toys.app(), CLIENTS, tamper=tamper)
    strategy = DareStrategy(buffer=4, deadline=5.0, fraction_evaluate=0.0, round_hook=until_late)
    strategy.start(grid, toys.record(toys.arrays()), num_rounds=200)
    assert (found[0]["reason"], found[0]["name"]) == ("late", "4")


def test_answers_that_all_fail_end_the_run(toys):
    def edit(partition, arrays, metrics):
        del metrics["num-examples"]

    with pytest.raises(RunError, match=r"a buffer of 3 updates has 0, and nobody is left.*weight"):
        go(MemoryGrid(toys.app(edit=edit), CLIENTS), toys, 3)


def test_a_buffer_that_can_never_be_full_says_so(toys):
    with pytest.raises(RunError, match=r"buffer = 7, and each client is in a buffer at most once"):
        go(MemoryGrid(toys.app(), CLIENTS), toys, 2, size=7, node_timeout=2)
    # Too few are left: the run ends with how many there are.
    grid = SlowGrid(toys.app(), CLIENTS, slow=())
    strategy = DareStrategy(buffer=5, node_timeout=2, fraction_evaluate=0.0, min_available_nodes=5)

    def leave(outcome):
        grid.offline.update(list(grid.partitions)[:3])

    strategy.round_hook = leave
    with pytest.raises(RunError, match=r"3 clients are online, each of which is in it at most"):
        strategy.start(grid, toys.record(toys.arrays()), num_rounds=3)


def test_a_client_that_comes_later_takes_part(toys):
    grid = SlowGrid(toys.app(), CLIENTS, slow=())
    late = list(grid.partitions)[3]
    grid.offline.add(late)

    def come(outcome):
        grid.offline.clear()

    strategy = DareStrategy(buffer=2, seed=1, fraction_evaluate=0.0, round_hook=come)
    outcomes = []
    strategy.round_hook = lambda outcome: (come(outcome), outcomes.append(outcome))[0]
    strategy.start(grid, toys.record(toys.arrays()), num_rounds=25)
    assert "3" in {name for outcome in outcomes for name in outcome.measurements["clients"]}


# --- with other parts ----------------------------------------------------------------------


def test_evaluations_ask_those_who_do_not_train(toys):
    grid = SlowGrid(toys.app(), CLIENTS)
    _, outcomes = go(grid, toys, 5, fraction_evaluate=1.0)
    for outcome in outcomes:
        assert outcome.client_metrics is not None
        assert len(outcome.measurements["evaluated"]) >= 3


@pytest.mark.parametrize(
    "words",
    [
        {"robust": "norm-bound"},
        {"robust": "nnm+trimmed-mean", "drop_rate": 0, "values": "b1"},
        {"robust": "nnm+trimmed-mean", "drop_rate": "auto"},
        {"robust": "momentum+nnm+trimmed-mean", "drop_rate": 0, "values": "f32"},
    ],
    ids=str,
)
def test_robust_rules_bear_a_liar_in_a_buffer(toys, words):
    def edit(partition, arrays, metrics):
        if partition == 4:
            for name in ("encoder.weight", "encoder.bias"):
                arrays[name] = arrays[name] - np.float32(3)

    def moved(**own):
        grid = SlowGrid(toys.app(edit=edit), CLIENTS)
        strategy, outcomes = go(grid, toys, 6, size=5, **own)
        after = numpy_of(strategy.broadcasting.arrays)["encoder.weight"]
        return np.linalg.norm(after - toys.arrays()["encoder.weight"]), outcomes

    guarded, outcomes = moved(byzantine=1, **words)
    harmed, _ = moved()
    assert guarded < harmed / 3
    assert all(outcome.measurements["robust"]["byzantine"] == 1 for outcome in outcomes)


def test_signed_answers_count_and_others_do_not(toys, tmp_path):
    identities = {
        str(partition): make_identity(tmp_path / f"{partition}.key") for partition in range(CLIENTS)
    }
    # Client 2 signs with another's key.
    grid = SlowGrid(toys.app(), CLIENTS, slow=(5,), node_config=lambda partition: {
        "partition-id": partition,
        "identity": str(tmp_path / f"{0 if partition == 2 else partition}.key"),
    })  # fmt: skip
    _, outcomes = go(grid, toys, 4, identities=identities)
    rejected = [one for outcome in outcomes for one in outcome.measurements["rejected"]]
    assert {(one["reason"], one["name"]) for one in rejected} == {("signature", "2")}
    assert all(outcome.measurements["accepted"] == 3 for outcome in outcomes)


@pytest.mark.parametrize(
    "words",
    [
        {"drop_rate": "auto"},
        {"keep_rates": "own"},
        {"exclude": ["^norm\\."]},
        {"method": "ties", "drop_rate": 0.5, "values": "i8"},
        {"upload_budget": UploadBudget(600)},
        {"fraction_train": 0.5},
        {"server_step": "adam"},
        {"mask": "bernoulli"},
    ],
    ids=str,
)
def test_what_works_in_a_buffer(toys, words, tmp_path):
    folder = tmp_path / "a"
    first, outcomes = go(SlowGrid(toys.app(), CLIENTS), toys, 5, folder=folder, **words)
    assert [outcome.measurements["accepted"] for outcome in outcomes] == [3] * 5
    again, _ = go(
        MemoryGrid(toys.app(), CLIENTS), toys, 5, arrivals=folder / "arrivals.jsonl", **words
    )
    assert again.broadcasting.model.ref.version == first.broadcasting.model.ref.version


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"method": "fisher"}, "fisher statistics"),
        ({"method": "wudi"}, "directions"),
        ({"keep_rates": "last"}, "told anew with each version"),
        ({"robust": "nnm+trimmed-mean", "byzantine": 1, "buffer": 5}, "set drop_rate 0"),
        ({"robust": "nnm+trimmed-mean", "byzantine": 2, "drop_rate": 0}, "raise buffer"),
        ({"steps": (merge_products,)}, "merge their factors"),
        ({"min_replies": 4}, "lower min_replies"),
        ({"privacy": ClientPrivacy(members=9)}, "in which release"),
        ({"buffer": -1}, "buffer = -1; an integer"),
        ({"buffer": True}, "buffer = True"),
        ({"fraction_train": 0.0}, "nobody trains"),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value),
)
def test_what_does_not_is_refused_before_the_run(words, said):
    with pytest.raises(ConfigError, match=said):
        DareStrategy(**{"drop_rate": 0.9, "buffer": 3, **words})


def test_loops_and_wrappers_of_rounds_are_refused(toys, memory_grid):
    from flwr.app import ConfigRecord
    from flwr.serverapp.strategy import FedAvg

    with pytest.raises(ConfigError, match="buffer is DareStrategy's own"):
        dare(FedAvg(), buffer=3)
    strategy = DareStrategy(buffer=2)
    with pytest.raises(ConfigError, match="call its start"):
        strategy.configure_train(1, toys.record(toys.arrays()), ConfigRecord(), None)

    class Own(DareStrategy):
        def aggregate_train(self, server_round, replies):
            return super().aggregate_train(server_round, replies)

    with pytest.raises(ConfigError, match="Own, which overrides aggregate_train"):
        Own(buffer=2)


# --- resume --------------------------------------------------------------------------------


def one_run(grid, toys, folder, *, merges, buffer=3, stop_after=None, **words):
    """Start or go on with a run in ``folder``; returns its strategy."""
    kept = StateFolder(folder / "state")
    if buffer:
        words["buffer"] = BufferSettings(buffer, record=folder / "buffer")
    strategy = DareStrategy(
        min_available_nodes=CLIENTS, fraction_evaluate=0.0, seed=3, drop_rate="0.9",
        dense=["^head"], server_step="momentum", downlink=make_downlink("auto"),
        round_hook=lambda o: bool(save(strategy, kept, o)) or o.round == stop_after, **words,
    )  # fmt: skip
    resumed = resume(strategy, kept)
    if resumed is None:
        initial, start, state = toys.record(toys.arrays()), 1, None
        keep_base(kept, initial)
    else:
        initial, start, state = resumed.arrays, resumed.round + 1, resumed.step_state
    strategy.start(grid, initial, num_rounds=merges, start_round=start, step_state=state)
    return strategy


def test_a_resumed_run_goes_on_from_its_record(toys, tmp_path):
    one_run(SlowGrid(toys.app(), CLIENTS), toys, tmp_path / "a", merges=9, stop_after=3)
    whole = one_run(SlowGrid(toys.app(), CLIENTS), toys, tmp_path / "a", merges=9)
    path = tmp_path / "a" / "buffer" / "arrivals.jsonl"
    events = read_events(path)
    assert [event.number for event in events if event.kind == "merge"] == list(range(1, 10))
    asked = [event.number for event in events if event.kind == "ask"]
    assert asked == list(range(len(asked)))
    lost = [event for event in events if event.kind == "lost"]
    assert lost and {event.why for event in lost} == {"lost"}
    # A run that was not stopped, and follows the record, ends with the same bits.
    strategy, _ = go(
        MemoryGrid(toys.app(), CLIENTS), toys, 9, arrivals=path, seed=3, dense=["^head"],
        server_step="momentum",
    )  # fmt: skip
    assert strategy.broadcasting.model.ref.version == whole.broadcasting.model.ref.version


def test_a_run_goes_on_as_it_was_begun(toys, tmp_path):
    one_run(SlowGrid(toys.app(), CLIENTS), toys, tmp_path / "a", merges=2)
    with pytest.raises(StateError, match="begun with a buffer, and is to go on without"):
        one_run(SlowGrid(toys.app(), CLIENTS), toys, tmp_path / "a", merges=4, buffer=0)
    one_run(SlowGrid(toys.app(), CLIENTS), toys, tmp_path / "b", merges=2, buffer=0)
    with pytest.raises(StateError, match="begun without a buffer"):
        one_run(SlowGrid(toys.app(), CLIENTS), toys, tmp_path / "b", merges=4)


def test_what_a_killed_run_lost_before_its_merge_is_followed(toys, tmp_path):
    """Killed between the last answer and the merge, a run has its losses before the merge."""
    go(SlowGrid(toys.app(), CLIENTS), toys, 4, folder=tmp_path / "a")
    events = read_events(tmp_path / "a" / "arrivals.jsonl")
    merge = next(place for place, event in enumerate(events) if event.kind == "merge")
    answered = {event.number for event in events[:merge] if event.kind == "answer"}
    under_way = [e for e in events[:merge] if e.kind == "ask" and e.number not in answered]
    assert under_way
    lost = [Event("lost", e.number, e.client, e.version, "lost") for e in under_way]
    record = Record(tmp_path / "b" / "arrivals.jsonl")
    record.begin([*events[:merge], *lost, events[merge]])
    _, outcomes = go(MemoryGrid(toys.app(), CLIENTS), toys, 4, arrivals=record.path)
    assert [outcome.measurements["accepted"] for outcome in outcomes] == [3] * 4


@pytest.mark.slow
def test_kill_9_loses_at_most_what_was_under_way(toys, tmp_path):
    """Each attempt is a process of its own, killed without warning, then resumed."""
    folder, merges = tmp_path / "a", 30
    for attempt in range(14):
        child = os.fork()
        if child == 0:  # pragma: no cover - in another process
            try:
                one_run(SlowGrid(toys.app(), CLIENTS), toys, folder, merges=merges)
            finally:
                os._exit(0)
        time.sleep(0.3 + 0.17 * attempt)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        before = read_events(folder / "buffer" / "arrivals.jsonl") if (
            folder / "buffer" / "arrivals.jsonl"
        ).exists() else []  # fmt: skip
        answered = {e.number for e in before if e.kind == "answer"}
        lost = {e.number for e in before if e.kind == "lost"}
        assert not answered & lost, "an accepted update was lost"
    whole = one_run(SlowGrid(toys.app(), CLIENTS), toys, folder, merges=merges)
    path = folder / "buffer" / "arrivals.jsonl"
    events = read_events(path)
    assert not {e.number for e in events if e.kind == "answer"} & {
        e.number for e in events if e.kind == "lost"
    }
    assert [e.number for e in events if e.kind == "merge"] == list(range(1, merges + 1))
    again, _ = go(
        MemoryGrid(toys.app(), CLIENTS), toys, merges, arrivals=path, seed=3, dense=["^head"],
        server_step="momentum",
    )  # fmt: skip
    assert again.broadcasting.model.ref.version == whole.broadcasting.model.ref.version
    assert json.loads(path.read_text().splitlines()[0])["kind"] == "ask"

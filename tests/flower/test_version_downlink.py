"""The version downlink through strategy and mod: small both ways, hidden from the training."""

import shutil

import numpy as np
import pytest
from flwr.app import RecordDict

from dare_agg.downlink.ways import make_downlink
from dare_agg.flower import DareStrategy, offer_base, reception
from dare_agg.vectors.model import global_model


def federate(grid, toys, rounds, *, form="auto", on_round=None, **words):
    outcomes = []

    def hook(outcome):
        outcomes.append(outcome)
        return on_round(outcome) if on_round else None

    strategy = DareStrategy(
        min_available_nodes=3,
        min_train_nodes=3,
        seed=4,
        drop_rate="0.9",
        dense=["^head"],
        downlink=make_downlink(form),
        round_hook=hook,
        **words,
    )
    arrays = words.pop("arrays", None) or toys.arrays()
    result = strategy.start(grid, toys.record(arrays), num_rounds=rounds)
    return strategy, outcomes, result


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DARE_AGG_CACHE", str(tmp_path))
    return tmp_path / "versions"


def test_after_the_base_only_small_steps_travel(memory_grid, toys, cache):
    grid = memory_grid(toys.app(), 3)
    strategy, outcomes, result = federate(grid, toys, 4)
    down = [np.mean(o.measurements["download_bytes"]) for o in outcomes]
    assert down[0] > 4000 > 2 * max(down[1:])
    model = global_model(
        {name: array.numpy() for name, array in result.arrays.items()},
        dense=["^head"],
        by_form=True,
    )
    assert model.ref.version == strategy.downlink.version == outcomes[-1].model.ref.version
    assert all(o.measurements["accepted"] == 3 for o in outcomes)
    # The evaluation brought every client to the newest version.
    assert set(strategy.broadcasting.have.values()) == {strategy.downlink.version}


@pytest.mark.parametrize("got_it", [True, False])
def test_a_late_client_is_not_sent_the_base_twice_unless_it_lacks_it(
    memory_grid, toys, cache, got_it
):
    late = []

    def tamper(partition, reply):
        if partition != 1 or "num-examples" not in str(reply.content) or late:
            return reply
        late.append(reply)
        if not got_it:
            shutil.rmtree(cache / "1")
        return None

    def node(number):
        return {"partition-id": number, "num-partitions": 3, "cache": str(cache / str(number))}

    grid = memory_grid(toys.app(), 3, tamper=tamper, node_config=node)
    _, outcomes, _ = federate(grid, toys, 3, fraction_evaluate=0.0, deadline=2.0)
    assert [o.measurements["accepted"] for o in outcomes] == [2, 3, 3]
    down = [max(o.measurements["download_bytes"]) for o in outcomes]
    assert down[0] > 4000 and (down[1] > 4000) == (not got_it) and down[2] < 2000


@pytest.mark.parametrize("form", ["full", "auto"])
@pytest.mark.parametrize("away", [(1, 2), (2,)])
def test_a_client_that_joins_late_or_comes_back_is_sent_what_it_lacks(
    memory_grid, toys, cache, caplog, form, away
):
    def node(number):
        return {"partition-id": number, "num-partitions": 4, "cache": str(cache / str(number))}

    def come_and_go(outcome):
        grid.offline = {last} if outcome.round + 1 in away else set()

    grid = memory_grid(toys.app(), 4, node_config=node)
    last = next(node for node, partition in grid.partitions.items() if partition == 3)
    grid.offline = {last} if 1 in away else set()
    words = {"form": form, "on_round": come_and_go, "fraction_evaluate": 0.0}
    with caplog.at_level("INFO"):
        _, outcomes, _ = federate(grid, toys, 4, **words)
    present = [3 if number in away else 4 for number in (1, 2, 3, 4)]
    assert [o.measurements["accepted"] for o in outcomes] == present
    assert [f"train: {n} of {n} clients" in caplog.text for n in (3, 4)] == [True, True]
    assert not [row for row in caplog.records if row.levelname == "WARNING"]
    assert "no longer hold" not in caplog.text  # it never had what others hold
    if form == "auto":
        there, joined = outcomes[2].measurements["download_bytes"][2:]
        assert (joined > 4000) == (1 in away) and there < 2000


def test_lost_contexts_and_broken_files_change_nothing(memory_grid, toys, cache):
    def disturb(outcome):
        for context in grid.contexts.values():
            context.state = RecordDict()
        heads = sorted((cache / "heads").iterdir())
        if outcome.round == 1:
            heads[0].write_bytes(heads[0].read_bytes()[:-50])
        if outcome.round == 2:
            data = bytearray(heads[1].read_bytes())
            data[-60] ^= 255
            heads[1].write_bytes(data)
        if outcome.round == 3:
            for path in (cache / "bases").iterdir():
                path.write_bytes(b"nothing")

    grid = memory_grid(toys.app(), 3)
    _, outcomes, _ = federate(grid, toys, 5, on_round=disturb)
    assert [o.measurements["accepted"] for o in outcomes] == [3] * 5
    # The same run on undisturbed clients.
    _, calm, _ = federate(memory_grid(toys.app(), 3), toys, 5)
    assert calm[-1].model.ref == outcomes[-1].model.ref


def test_a_client_that_makes_the_base_itself_is_not_sent_it(memory_grid, toys, cache, monkeypatch):
    monkeypatch.setattr(reception, "_OFFERS", [])
    offer_base(lambda message, context: {"other": np.ones(3, np.float32)})
    offer_base(lambda message, context: toys.arrays())
    grid = memory_grid(toys.app(), 3)
    _, outcomes, _ = federate(grid, toys, 2)
    assert all(max(o.measurements["download_bytes"]) < 2000 for o in outcomes)


def test_a_second_run_from_the_same_base_finds_it(memory_grid, toys, cache):
    federate(memory_grid(toys.app(), 3), toys, 2)
    _, outcomes, _ = federate(memory_grid(toys.app(), 3), toys, 1)
    # No base again: the exact sum back to the start costs nothing.
    assert max(outcomes[0].measurements["download_bytes"]) < 2500


def test_momentum_takes_the_dense_form(memory_grid, toys, cache):
    strategy, outcomes, _ = federate(memory_grid(toys.app(), 3), toys, 3, server_step="momentum")
    assert [s.head.form for s in strategy.downlink.steps] == ["union", "dense", "dense"]
    assert outcomes[-1].measurements["accepted"] == 3

"""Who is asked and who has answered, told while a run goes on."""

import itertools

from flwr.app import ConfigRecord

from dare_agg.flower import DareStrategy
from dare_agg.flower.standing import Standing
from dare_agg.privacy.clients import ClientPrivacy


def run(memory_grid, toys, clients=3, rounds=2, **words):
    said = []
    strategy = DareStrategy(seed=1, **words)
    strategy.standing.tell = said.append
    strategy.start(
        memory_grid(toys.app(), clients),
        toys.record(toys.arrays()),
        num_rounds=rounds,
        train_config=ConfigRecord({}),
    )
    return said


def test_each_exchange_is_told_as_it_begins_and_as_answers_come(memory_grid, toys):
    said = run(memory_grid, toys)
    assert said[-1].phase == "end"
    for number in (1, 2):
        own = [one for one in said if one.round == number and one.phase != "end"]
        phases = list(dict.fromkeys(one.phase for one in own))
        assert phases == ["round", "train", "merge", "evaluate"]
        assert {one.rounds for one in own} == {2}
        for phase in ("train", "evaluate"):
            asked = [one for one in own if one.phase == phase]
            assert [(one.asked, one.answered) for one in asked] == [(3, n) for n in range(4)]
            assert set(asked[0].waiting) == {"0", "1", "2"} and not asked[-1].waiting
            for before, after in itertools.pairwise(asked):
                assert set(after.waiting) < set(before.waiting)


def test_a_private_run_names_nobody(memory_grid, toys):
    said = run(
        memory_grid, toys, clients=4, rounds=1, drop_rate=0.9, weighting="equal",
        privacy=ClientPrivacy(50, noise=1.0), dense=["^head"], exclude=["norm"],
    )  # fmt: skip
    assert any(one.asked for one in said) and not any(one.waiting for one in said)


def test_of_many_clients_some_answers_are_told_and_the_last_ones_all():
    said = []
    standing = Standing(str, said.append)
    standing.begin(1, 1)
    standing.ask("train", range(1000))
    for node in range(1000):
        standing.heard(node)
        standing.heard(node)
    told = [one.answered for one in said if one.phase == "train"]
    assert len(told) < 60 and told[-17:] == list(range(984, 1001))
    assert len(said[1].waiting) == 16

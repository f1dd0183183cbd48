"""A run whose drop would ruin the model says so in its second round, and names the line."""

import logging
import re

import pytest
from flwr.app import ConfigRecord

from dare_agg.codec.budget import UploadBudget
from dare_agg.flower import DareStrategy
from dare_agg.rounds.noise import LOUD, QUIET


def run(memory_grid, toys, caplog, *, moved, rounds=4, **words):
    """A run whose clients move each weight by ``moved``; its noise by round, and its warnings."""

    def edit(partition, tuned, metrics):
        for name, array in tuned.items():
            if array.dtype.kind == "f" and "running" not in name:
                tuned[name] = array + moved * toys.arrays(partition + 9)[name]

    told = []
    strategy = DareStrategy(
        seed=1,
        fraction_evaluate=0.0,
        round_hook=lambda outcome: told.append(outcome.measurements["noise"]),
        **{"drop_rate": 0.9, **words},
    )
    with caplog.at_level(logging.WARNING, "flwr"):
        strategy.start(
            memory_grid(toys.app(edit=edit), 2),
            toys.record(toys.arrays()),
            num_rounds=rounds,
            train_config=ConfigRecord({}),
        )
    return told, [r.getMessage() for r in caplog.records if "noise" in r.getMessage()]


def test_training_from_scratch_is_warned_of_in_round_2_and_the_line_helps(
    memory_grid, toys, caplog
):
    told, said = run(memory_grid, toys, caplog, moved=0.5)
    assert told[0] > LOUD
    assert len(said) == 1
    assert said[0].startswith("round 2: ")
    words = re.search(r"give DareStrategy (drop_rate=.+)$", said[0])[1]
    caplog.clear()
    told, said = run(memory_grid, toys, caplog, moved=0.5, **eval(f"dict({words})"))
    assert not said
    assert max(told) <= 2 * QUIET


@pytest.mark.parametrize("words", [{}, {"drop_rate": 0.99}, {"drop_rate": 0, "values": "f32"}])
def test_fine_tuning_and_what_is_sent_whole_are_not(memory_grid, toys, caplog, words):
    told, said = run(memory_grid, toys, caplog, moved=0.5 if words.get("values") else 0.0, **words)
    assert max(told) < LOUD / 2
    assert not said


def test_a_budget_is_what_has_to_grow_where_it_chooses(memory_grid, toys, caplog):
    few = UploadBudget(nbytes=500)
    _, said = run(memory_grid, toys, caplog, moved=1.0, upload_budget=few)
    asked = re.search(r"an upload_budget of at least (\d+) bytes$", said[0])[1]
    caplog.clear()
    more = UploadBudget(nbytes=int(asked))
    told, said = run(memory_grid, toys, caplog, moved=1.0, upload_budget=more)
    assert not said
    assert max(told) <= 2 * QUIET

"""Rounds that clients miss: what the server says, and when the run ends."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from flwr.serverapp.strategy import FedAvg
from strategy_runs import DENSE, edit_record, gone, is_train, run
from toy import numpy_of

from dare_agg.errors import RunError
from dare_agg.flower import DareStrategy
from dare_agg.flower.records import REPLY_KEY


def test_an_app_without_the_mod_is_told_so(memory_grid, toys):
    with pytest.raises(RunError, match=r"ClientApp\(mods=\[dare_mod\]\)") as caught:
        run(memory_grid(toys.app([]), 2), toys, 1, node_timeout=30)
    assert caught.value.reason == "refused"


def test_clients_with_other_code_are_refused_before_training(memory_grid, toys, monkeypatch):
    trained = []
    monkeypatch.setattr("dare_agg.rounds.messages.package_fingerprint", lambda: "0" * 16)
    app = toys.app(edit=lambda *arguments: trained.append(arguments))
    with pytest.raises(RunError, match="neutral directory"):
        run(memory_grid(app, 2), toys, 1, node_timeout=30)
    assert not trained


def test_a_round_in_which_nobody_trained_fails_loudly(memory_grid, toys):
    def edit(partition, tuned, metrics):
        raise RuntimeError("CUDA is on fire")

    with pytest.raises(RunError, match=r"client-error ×2.*CUDA is on fire") as caught:
        run(memory_grid(toys.app(edit=edit), 2), toys, 1)
    assert caught.value.reason == "nobody-trained"


def missing(*rounds, clients=2):
    """An app all of whose clients raise in these rounds."""

    def edit(partition, tuned, metrics):
        edit.calls += 1
        if (edit.calls - 1) // clients + 1 in rounds:
            raise RuntimeError("not now")

    edit.calls = 0
    return edit


def test_a_round_that_all_miss_leaves_the_model_as_fedavg_does(memory_grid, toys, caplog):
    fedavg = FedAvg(fraction_evaluate=0.0).start(
        memory_grid(toys.app(edit=missing(1, 3)), 2), toys.record(toys.arrays()), num_rounds=4
    )
    caplog.clear()
    dare, outcomes = run(memory_grid(toys.app(edit=missing(1, 3)), 2), toys, 4, **DENSE)
    assert [o.measurements["accepted"] for o in outcomes] == [0, 2, 0, 2]
    assert set(dare.train_metrics_clientapp) == set(fedavg.train_metrics_clientapp) == {2, 4}
    for name, array in numpy_of(fedavg.arrays).items():
        if not name.endswith("num_batches_tracked"):
            np.testing.assert_allclose(numpy_of(dare.arrays)[name], array, rtol=0, atol=2e-6)
    assert "2 of 4 rounds left the model as it was; the last, round 3: 0 of 2" in caplog.text


def raises(partition, reply):
    return gone(reply) if is_train(reply) else reply


def is_silent(partition, reply):
    return None if is_train(reply) else reply


def answers_another_round(partition, reply):
    return edit_record(REPLY_KEY, round=9)(reply) if is_train(reply) else reply


@pytest.mark.parametrize(
    ("tamper", "told"),
    [
        (raises, r"lost ×2\); first: Flower error code 5: Node unavailable"),
        (is_silent, r"late ×2\); first: no answer before the round's deadline"),
        (answers_another_round, r"round ×2\); first: the reply is of round 9, this is round 3"),
    ],
)
def test_a_run_whose_rounds_all_miss_fails_and_says_what_went_wrong(
    memory_grid, toys, tamper, told
):
    with pytest.raises(RunError, match=f"none of 3 rounds got enough updates.*{told}") as caught:
        run(memory_grid(toys.app(), 2, tamper=tamper), toys, 3, deadline=0.5)
    assert caught.value.reason == "nobody-trained"


def test_answers_that_an_app_would_give_again_end_a_run_at_once_as_under_fedavg(memory_grid, toys):
    def edit(partition, tuned, metrics):
        edit.calls += 1
        del metrics["num-examples"]

    for strategy, mods in ((DareStrategy(fraction_evaluate=0.0), None), (FedAvg(), [])):
        edit.calls = 0
        with pytest.raises(Exception, match="num-examples"):
            strategy.start(
                memory_grid(toys.app(mods, edit=edit), 2), toys.record(toys.arrays()), num_rounds=9
            )
        assert edit.calls == 2


def test_how_many_rounds_in_a_row_may_miss_can_be_bounded(memory_grid, toys):
    _, outcomes = run(memory_grid(toys.app(edit=missing(1, 3)), 2), toys, 4, max_empty_rounds=1)
    assert [o.measurements["accepted"] for o in outcomes] == [0, 2, 0, 2]
    edit = missing(2, 3, 4)
    with pytest.raises(RunError, match="round 3: 0 of 2 clients"):
        run(memory_grid(toys.app(edit=edit), 2), toys, 9, max_empty_rounds=1)
    assert edit.calls == 6


def test_the_deadline_closes_a_round_without_the_silent(memory_grid, toys):
    def tamper(partition, reply):
        return None if partition == 1 and is_train(reply) else reply

    started = time.monotonic()
    _, outcomes = run(memory_grid(toys.app(), 3, tamper=tamper), toys, 1, deadline=1.0)
    assert time.monotonic() - started < 10
    assert [(r.client, r.reason) for r in outcomes[0].rejections] == [(1, "late")]
    assert outcomes[0].measurements["clients"] == ["0", "2"]


def test_the_deadline_holds_while_a_pull_blocks(memory_grid, toys):
    """Flower's pull waits for a slow upload; the round must not."""
    release = threading.Event()

    def tamper(partition, reply):
        return reply

    grid = memory_grid(toys.app(), 3, tamper=tamper)
    pull = grid.pull_messages
    blocked = []

    def pull_or_block(ids):
        if len(grid.sent) >= 6 and ids[0] == grid.sent[-1].metadata.message_id and not blocked:
            blocked.append(ids)
            release.wait(20)
        return pull(ids)

    grid.pull_messages = pull_or_block
    started = time.monotonic()
    _, outcomes = run(grid, toys, 1, deadline=1.5)
    release.set()
    assert blocked and time.monotonic() - started < 10
    assert [r.reason for r in outcomes[0].rejections] == ["late"]


def test_too_few_nodes_is_a_clear_error_and_no_hang(memory_grid, toys):
    started = time.monotonic()
    with pytest.raises(RunError, match=r"1 of the 2 clients needed.*start more SuperNodes") as e:
        run(memory_grid(toys.app(), 1), toys, 1, node_timeout=0.2)
    assert e.value.reason == "nodes" and time.monotonic() - started < 5

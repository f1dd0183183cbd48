"""What a client counts by: numbers of examples that are absurd, huge, 0 or not there."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.serverapp.strategy import FedAvg
from strategy_runs import DENSE, edit_record, is_train, rejected, run
from toy import numpy_of

from dare_agg.errors import RunError


@pytest.mark.parametrize("weight", [-79, float("nan"), 2.0**54, float("inf"), [1, 2]])
def test_absurd_weights_are_rejected_and_the_round_goes_on(memory_grid, toys, weight):
    rejection = rejected(memory_grid, toys, edit_record("metrics", **{"num-examples": weight}))
    assert rejection.reason == "weight"


def counting(weights):
    """An app whose clients report these numbers of examples."""

    def edit(partition, tuned, metrics):
        metrics["num-examples"] = weights[partition]

    return edit


@pytest.mark.parametrize(
    "weights",
    [(10, 0, 30), (0.0, 0, 7), (50_000_000, 10**12, 3 * 10**11), (1e12, 2.5e12, 8e12)],
)
def test_no_examples_and_numbers_of_tokens_weigh_as_fedavg_weighs_them(
    memory_grid, toys, weights, caplog
):
    edit = counting(weights)
    fedavg = FedAvg(fraction_evaluate=0.0).start(
        memory_grid(toys.app(edit=edit), 3), toys.record(toys.arrays()), num_rounds=2
    )
    dare, outcomes = run(memory_grid(toys.app(edit=edit), 3), toys, 2, **DENSE)
    for name, array in numpy_of(fedavg.arrays).items():
        if not name.endswith("num_batches_tracked"):
            np.testing.assert_allclose(numpy_of(dare.arrays)[name], array, rtol=0, atol=2e-6)
    assert dare.train_metrics_clientapp[2]["loss"] == pytest.approx(
        fedavg.train_metrics_clientapp[2]["loss"]
    )
    without = [str(client) for client, weight in enumerate(weights) if not weight]
    assert [r["name"] for r in outcomes[0].measurements["rejected"]] == without
    assert all(r.reason == "no-examples" for r in outcomes[0].rejections)
    assert "rejected" not in caplog.text  # nothing is wrong with them


def test_clients_that_all_have_no_examples_are_told_the_cause(memory_grid, toys):
    app = toys.app(edit=counting([0, 0]))
    says = r"no-examples ×2.*0 examples.*give it data, or set weighting='equal'"
    with pytest.raises(RunError, match=says):
        run(memory_grid(app, 2), toys, 1)
    _, outcomes = run(memory_grid(app, 2), toys, 1, weighting="equal")
    assert outcomes[0].measurements["accepted"] == 2


def test_a_client_without_examples_does_not_count_in_an_evaluation(memory_grid, toys, caplog):
    def tamper(partition, reply):
        if partition == 1 and not is_train(reply) and "metrics" in reply.content:
            reply.content["metrics"].update({"num-examples": 0, "sum": float("nan")})
        return reply

    words = {"fraction_evaluate": 1.0, "min_evaluate_nodes": 1}
    _, outcomes = run(memory_grid(toys.app(), 3, tamper=tamper), toys, 1, **words)
    assert np.isfinite(outcomes[0].client_metrics["sum"])
    assert not [row for row in caplog.records if row.levelname == "WARNING"]


def test_a_huge_weight_is_cut_shown_and_logged(memory_grid, toys, caplog):
    def tamper(partition, reply):
        if partition == 1 and is_train(reply):
            reply.content["metrics"]["num-examples"] = 1e7
        return reply

    _, outcomes = run(memory_grid(toys.app(), 3, tamper=tamper), toys, 1)
    measured = outcomes[0].measurements
    examples, weights = measured["examples"], measured["weights"]
    assert measured["weights_cut"] == ["1"] and examples[1] == 1e7
    assert weights[1] / max(weights[0], weights[2]) == pytest.approx(100)
    assert "round 1: 1 claimed more than 100 times the round's median weight" in caplog.text


def test_a_huge_weight_does_not_take_the_evaluation(memory_grid, toys):
    def tamper(partition, reply):
        if partition == 1 and not is_train(reply) and "metrics" in reply.content:
            reply.content["metrics"].update({"num-examples": 1e7, "sum": 1e9})
        return reply

    words = {"fraction_evaluate": 1.0, "min_evaluate_nodes": 1}
    _, outcomes = run(memory_grid(toys.app(), 3, tamper=tamper), toys, 1, **words)
    share = outcomes[0].client_metrics["sum"] / 1e9
    assert 0.9 < share < 0.991
    _, outcomes = run(memory_grid(toys.app(), 3, tamper=tamper), toys, 1, weight_bound=0, **words)
    assert outcomes[0].client_metrics["sum"] / 1e9 > 0.9999


def test_a_missing_weight_is_rejected_unless_all_are_equal(memory_grid, toys):
    def tamper(reply):
        del reply.content["metrics"]
        return reply

    assert rejected(memory_grid, toys, tamper).reason == "weight"

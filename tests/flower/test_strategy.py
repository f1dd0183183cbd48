"""The strategy and the mod together, through an in-memory grid and real ClientApps."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from flwr.app import ArrayRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg, Strategy

from dare_agg.codec.budget import ClientTerms
from dare_agg.codec.mask import parse_drop_rate
from dare_agg.errors import ConfigError, RunError
from dare_agg.flower import DareStrategy, dare_mod
from dare_agg.flower import strategy as strategy_module
from dare_agg.flower.internals import FailureCode
from dare_agg.flower.records import REPLY_KEY, UPDATE_KEY
from dare_agg.flower.workers import WORKER_DIED
from dare_agg.rounds.step import StepState
from simulations.runs.memory_grid import stamp


def run(grid, toys, rounds=2, arrays=None, evaluate_fn=None, start=None, **words):
    outcomes = []
    words = {"seed": 7, "fraction_evaluate": 0.0, "min_evaluate_nodes": 0, **words}
    hook = words.pop("round_hook", None)

    def remember(outcome):
        outcomes.append(outcome)
        return hook(outcome) if hook else None

    strategy = DareStrategy(round_hook=remember, **words)
    record = toys.record(toys.arrays() if arrays is None else arrays)
    result = strategy.start(
        grid, record, num_rounds=rounds, timeout=30, evaluate_fn=evaluate_fn, **(start or {})
    )
    return result, outcomes


def numpy_of(record: ArrayRecord) -> dict[str, np.ndarray]:
    return {name: array.numpy() for name, array in record.items()}


def test_dense_mode_equals_flowers_fedavg(memory_grid, toys):
    fedavg = FedAvg(fraction_evaluate=0.0).start(
        memory_grid(toys.app(), 4), toys.record(toys.arrays()), num_rounds=3
    )
    dare, _ = run(
        memory_grid(toys.app(), 4), toys, 3, drop_rate=0, values="f32", dense_values="f32"
    )
    expected, found = numpy_of(fedavg.arrays), numpy_of(dare.arrays)
    assert list(found) == list(expected)
    for name, array in expected.items():
        if array.dtype.kind == "f" and not name.endswith("num_batches_tracked"):
            np.testing.assert_allclose(found[name], array, rtol=0, atol=2e-6)
    for number in (1, 2, 3):
        assert dare.train_metrics_clientapp[number]["loss"] == pytest.approx(
            fedavg.train_metrics_clientapp[number]["loss"]
        )


def test_the_same_app_serves_fedavg_with_the_mod_in_place(memory_grid, toys):
    """The mod leaves other strategies' messages alone: one app, both strategies."""
    with_mod = FedAvg(fraction_evaluate=0.0).start(
        memory_grid(toys.app([dare_mod]), 3), toys.record(toys.arrays()), num_rounds=1
    )
    without = FedAvg(fraction_evaluate=0.0).start(
        memory_grid(toys.app([]), 3), toys.record(toys.arrays()), num_rounds=1
    )
    for name, array in numpy_of(without.arrays).items():
        np.testing.assert_allclose(numpy_of(with_mod.arrays)[name], array, atol=1e-6)


def test_same_seed_same_bits_whatever_the_order_of_nodes_and_replies(memory_grid, toys):
    results = [
        run(memory_grid(toys.app(), 6, shuffle=shuffle), toys, 3, fraction_train=0.5)
        for shuffle in (1, 2)
    ]
    (first, one), (second, other) = results
    for name, array in numpy_of(first.arrays).items():
        assert array.tobytes() == numpy_of(second.arrays)[name].tobytes()
    assert [o.measurements["clients"] for o in one] == [o.measurements["clients"] for o in other]
    assert len({tuple(o.measurements["clients"]) for o in one}) > 1  # samples differ by round
    third, _ = run(memory_grid(toys.app(), 6), toys, 3, fraction_train=0.5, seed=8)
    assert any(
        array.tobytes() != numpy_of(third.arrays)[name].tobytes()
        for name, array in numpy_of(first.arrays).items()
    )


def test_uploads_shrink_by_the_rate_and_are_measured(memory_grid, toys):
    _, outcomes = run(memory_grid(toys.app(), 3), toys, 1, arrays=large_arrays(), drop_rate=0.9)
    measured = outcomes[0].measurements
    dense_bytes = 4 * 300 * 400
    assert max(measured["update_bytes"]) < dense_bytes / 280
    assert min(measured["download_bytes"]) > dense_bytes
    assert measured["accepted"] == 3 and measured["rejected"] == []
    assert all(norm > 0 for norm in measured["delta_norms"])
    assert measured["survivors_per_element"] == pytest.approx(0.3)


def large_arrays() -> dict[str, np.ndarray]:
    return {"w": np.zeros((300, 400), np.float32)}


def test_excluded_tensors_never_leave_and_stay_each_clients_own(memory_grid, toys):
    seen: dict[int, list[np.ndarray]] = {}

    def edit(partition, tuned, metrics):
        seen.setdefault(partition, []).append(tuned["head.weight"])

    grid = memory_grid(toys.app(edit=edit), 2)
    result, _ = run(grid, toys, 3, exclude=["head"])
    start = toys.arrays()["head.weight"]
    assert np.array_equal(numpy_of(result.arrays)["head.weight"], start)
    for partition, heads in seen.items():
        own = start
        for number, head in enumerate(heads, start=1):
            own = own + toys.delta("head.weight", own.shape, partition, number)
            np.testing.assert_allclose(head, own, atol=1e-6)


def test_dense_tensors_travel_whole(memory_grid, toys):
    result, outcomes = run(
        memory_grid(toys.app(), 2), toys, 1, dense=["head"], dense_values="f32", weighting="equal"
    )
    start = toys.arrays()["head.weight"]
    mean = np.mean([toys.delta("head.weight", start.shape, c, 1) for c in range(2)], axis=0)
    np.testing.assert_allclose(numpy_of(result.arrays)["head.weight"], start + mean, atol=1e-6)
    assert min(outcomes[0].measurements["dense_bytes"]) > 4 * 75


def test_clients_may_have_their_own_rate_and_format(memory_grid, toys):
    def node_config(partition):
        return {"partition-id": partition, "uplink-kbit-s": 20.0 if partition == 0 else 5000.0}

    def terms(hello):
        if hello.uplink_kbit_s < 100:
            return ClientTerms(parse_drop_rate("0.99"), "b1")
        return ClientTerms(parse_drop_rate("0.5"), "f16")

    grid = memory_grid(toys.app(), 3, node_config=node_config)
    _, outcomes = run(grid, toys, 1, client_terms=terms)
    measured = outcomes[0].measurements
    assert measured["drop_rates"] == pytest.approx([0.99, 0.5, 0.5])
    assert measured["update_bytes"][0] < measured["update_bytes"][1]


def test_evaluation_on_clients_and_on_the_server(memory_grid, toys):
    calls = []

    def evaluate_fn(number, arrays):
        calls.append(number)
        return MetricRecord({"total": float(sum(a.numpy().sum() for a in arrays.values()))})

    result, outcomes = run(
        memory_grid(toys.app(), 2),
        toys,
        2,
        evaluate_fn=evaluate_fn,
        fraction_evaluate=1.0,
        min_evaluate_nodes=2,
        exclude=["num_batches"],
    )
    assert calls == [0, 1, 2] and set(result.evaluate_metrics_serverapp) == {0, 1, 2}
    assert result.evaluate_metrics_clientapp[2]["sum"] != 0
    assert outcomes[1].client_metrics["sum"] == result.evaluate_metrics_clientapp[2]["sum"]
    assert outcomes[1].server_metrics["total"] == result.evaluate_metrics_serverapp[2]["total"]
    assert outcomes[1].measurements["evaluate_download_bytes"] > 0


@pytest.mark.parametrize("step", ["plain", "momentum", "adam"])
def test_a_resumed_run_ends_with_the_same_bits(memory_grid, toys, step):
    whole, outcomes = run(memory_grid(toys.app(), 3), toys, 4, server_step=step)
    half = outcomes[1]
    # Local buffers live on the clients; a resumed client starts from the server's copy.
    resumed, _ = run(
        memory_grid(toys.app(), 3),
        toys,
        4,
        arrays=half.model.arrays(),
        server_step=step,
        start={"start_round": 3, "step_state": half.step_state},
    )
    for name, array in numpy_of(whole.arrays).items():
        assert array.tobytes() == numpy_of(resumed.arrays)[name].tobytes()
    assert isinstance(half.step_state, StepState) and half.step_state.count == 2


def test_the_hook_can_stop_early(memory_grid, toys):
    result, outcomes = run(
        memory_grid(toys.app(), 2), toys, 9, round_hook=lambda outcome: outcome.round == 2
    )
    assert len(outcomes) == 2 and set(result.train_metrics_clientapp) == {1, 2}
    assert len(result.arrays) == len(toys.arrays())


def test_ties_runs_and_differs_from_the_mean(memory_grid, toys):
    mean, _ = run(memory_grid(toys.app(), 3), toys, 1, drop_rate=0, values="f32")
    ties, _ = run(memory_grid(toys.app(), 3), toys, 1, drop_rate=0, values="f32", method="ties")
    a, b = numpy_of(mean.arrays)["encoder.weight"], numpy_of(ties.arrays)["encoder.weight"]
    assert not np.array_equal(a, b)
    start = toys.arrays()["encoder.weight"]
    assert np.corrcoef((a - start).ravel(), (b - start).ravel())[0, 1] > 0.8


# --- failures ------------------------------------------------------------------------------


def test_too_few_nodes_is_a_clear_error_and_no_hang(memory_grid, toys):
    started = time.monotonic()
    with pytest.raises(RunError, match=r"1 of the 2 clients needed.*start more SuperNodes") as e:
        run(memory_grid(toys.app(), 1), toys, 1, node_timeout=0.2)
    assert e.value.reason == "nodes" and time.monotonic() - started < 5


def test_an_app_without_the_mod_is_told_so(memory_grid, toys):
    with pytest.raises(RunError, match=r"ClientApp\(mods=\[dare_mod\]\)") as caught:
        run(memory_grid(toys.app([]), 2), toys, 1, node_timeout=30)
    assert caught.value.reason == "refused"


def test_clients_with_other_code_are_refused_before_training(memory_grid, toys, monkeypatch):
    trained = []
    monkeypatch.setattr("dare_agg.flower.records.package_fingerprint", lambda: "0" * 16)
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


def is_train(reply: Message) -> bool:
    return reply.has_error() or UPDATE_KEY in reply.content


def rejected(memory_grid, toys, tamper, **words):
    """Run one round of three in which client 1's reply is tampered with."""

    def only_first(partition, reply):
        if partition != 1 or not is_train(reply):
            return reply
        return tamper(reply)

    _, outcomes = run(memory_grid(toys.app(), 3, tamper=only_first), toys, 1, **words)
    assert outcomes[0].measurements["clients"] == ["0", "2"]
    (rejection,) = [r for r in outcomes[0].rejections if r.client == 1]
    return rejection


def edit_record(key, **changes):
    def tamper(reply):
        reply.content[key].update(changes)
        return reply

    return tamper


def set_weight(value):
    def tamper(reply):
        for record in reply.content.values():
            if isinstance(record, MetricRecord):
                dict.__setitem__(record, "num-examples", value) if isinstance(
                    record, dict
                ) else record._data.__setitem__("num-examples", value)
        return reply

    return tamper


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("codec", 99, "version"),
        ("codec", "1", "version"),
        ("package", "0" * 16, "package"),
        ("round", 5, "round"),
        ("plan", bytes(16), "plan"),
    ],
)
def test_receipts_of_another_round_plan_or_code_are_rejected(
    memory_grid, toys, field, value, reason
):
    assert rejected(memory_grid, toys, edit_record(REPLY_KEY, **{field: value})).reason == reason


@pytest.mark.parametrize("weight", [-79, float("nan"), 2.0**54, float("inf"), [1, 2]])
def test_absurd_weights_are_rejected_and_the_round_goes_on(memory_grid, toys, weight):
    rejection = rejected(memory_grid, toys, edit_record("metrics", **{"num-examples": weight}))
    assert rejection.reason == "weight"


def counting(weights):
    """An app whose clients report these numbers of examples."""

    def edit(partition, tuned, metrics):
        metrics["num-examples"] = weights[partition]

    return edit


DENSE = {"drop_rate": 0, "values": "f32", "dense_values": "f32", "dense": ["head"]}


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


def test_truncated_oversized_and_missing_payloads_are_rejected(memory_grid, toys):
    def truncate(reply):
        array = reply.content[UPDATE_KEY]["0"]
        array.data = array.data[:-3]
        array.shape = (len(array.data),)
        return reply

    def lie_about_shape(reply):
        reply.content[UPDATE_KEY]["0"].shape = (37 * 2**30,)
        return reply

    def inflate(reply):
        array = reply.content[UPDATE_KEY]["0"]
        array.data = array.data + bytes(10**6)
        array.shape = (len(array.data),)
        return reply

    def drop(reply):
        del reply.content[UPDATE_KEY]
        return reply

    def trailing(reply):
        array = reply.content[UPDATE_KEY]["0"]
        array.data = array.data + b"\0"
        array.shape = (len(array.data),)
        return reply

    assert rejected(memory_grid, toys, truncate).reason == "truncated"
    assert rejected(memory_grid, toys, lie_about_shape).reason == "truncated"
    assert rejected(memory_grid, toys, inflate).reason == "oversized"
    assert rejected(memory_grid, toys, drop).reason == "truncated"
    assert rejected(memory_grid, toys, trailing).reason in ("trailing", "checksum")


def test_full_arrays_instead_of_an_update_are_rejected(memory_grid, toys):
    def tamper(reply):
        reply.content[UPDATE_KEY] = toys.record(toys.arrays())
        return reply

    def without_receipt(reply):
        del reply.content[REPLY_KEY]
        return reply

    assert rejected(memory_grid, toys, tamper).reason == "truncated"
    assert rejected(memory_grid, toys, without_receipt).reason == "mod"


def test_a_diverged_client_refuses_itself_and_the_round_goes_on(memory_grid, toys):
    def edit(partition, tuned, metrics):
        if partition == 1:
            tuned["encoder.weight"][3, 4] = np.nan

    _, outcomes = run(memory_grid(toys.app(edit=edit), 3), toys, 1)
    (rejection,) = outcomes[0].rejections
    assert rejection.reason == "non-finite" and "encoder.weight" in rejection.detail


def test_an_answer_for_another_node_is_rejected(memory_grid, toys):
    def tamper(reply):
        stamp(reply, src_node_id=424242)
        return reply

    def only_first(partition, reply):
        return tamper(reply) if partition == 1 and is_train(reply) else reply

    _, outcomes = run(memory_grid(toys.app(), 3, tamper=only_first), toys, 1, deadline=1.0)
    assert {r.reason for r in outcomes[0].rejections} == {"unknown-node", "late"}
    assert outcomes[0].measurements["clients"] == ["0", "2"]


def test_error_replies_from_the_superlink_count_for_their_node(memory_grid, toys):
    def tamper(reply):
        error = Message(
            Error(code=FailureCode.NODE_GONE, reason="Node unavailable"),
            reply_to=as_instruction(reply),
        )
        stamp(error, src_node_id=1)
        return error

    rejection = rejected(memory_grid, toys, tamper)
    assert rejection.reason == "lost" and "code 5" in rejection.detail


def test_a_node_lost_when_asked_who_it_is_takes_part_once_it_is_back(memory_grid, toys):
    """Killed with its SuperLink and started again, a node counts as online for a while."""
    lost = []

    def tamper(partition, reply):
        if partition != 1 or lost:
            return reply
        lost.append(reply)
        return Message(
            Error(code=FailureCode.NODE_GONE, reason="Node unavailable"),
            reply_to=as_instruction(reply),
        )

    grid = memory_grid(toys.app(), 3, tamper=tamper)
    _, outcomes = run(grid, toys, 1, min_available_nodes=3, node_timeout=30)
    assert outcomes[0].measurements["clients"] == ["0", "1", "2"] and len(lost) == 1


@pytest.mark.parametrize("deaths", [2, 99])
def test_a_worker_that_dies_of_the_question_who_it_is_is_asked_three_times(
    memory_grid, toys, deaths
):
    died = []

    def tamper(partition, reply):
        if partition != 1 or len(died) >= deaths:
            return reply
        died.append(reply)
        error = Error(code=0, reason=f"<class 'RunError'>:<'{WORKER_DIED}'>")
        return Message(error, reply_to=as_instruction(reply))

    grid = memory_grid(toys.app(), 3, tamper=tamper)
    words = {"min_available_nodes": 2 if deaths > 2 else 3, "node_timeout": 30}
    _, outcomes = run(grid, toys, 4, **words)
    assert len(died) == min(deaths, 3)
    last = outcomes[-1].measurements
    assert last["clients"] == (["0", "2"] if deaths > 2 else ["0", "1", "2"])
    assert [WORKER_DIED in one["detail"] for one in last["refused"]] == [True] * (deaths > 2)


def gone(reply: Message) -> Message:
    """What Flower answers in place of a reply when its node is lost."""
    error = Error(code=FailureCode.NODE_GONE, reason="Node unavailable")
    return Message(error, reply_to=as_instruction(reply))


def as_instruction(reply: Message) -> Message:
    instruction = Message(
        RecordDict(), dst_node_id=reply.metadata.src_node_id, message_type="train"
    )
    stamp(instruction, message_id=reply.metadata.reply_to_message_id)
    return instruction


def test_hostile_metrics_do_not_end_the_run(memory_grid, toys):
    def edit(partition, tuned, metrics):
        if partition == 1:
            metrics["loss"] = [1.0, float("nan")]
            metrics["\x1b[2J" + "x" * 500] = 1.0

    result, outcomes = run(memory_grid(toys.app(edit=edit), 3), toys, 1)
    assert outcomes[0].measurements["accepted"] == 3
    assert "loss" not in result.train_metrics_clientapp[1]


def inbox_of(memory_grid, toys):
    """The plans and honest replies of one round, for Flower's own loop."""
    grid = memory_grid(toys.app(), 3)
    strategy = DareStrategy(seed=1, fraction_evaluate=0.0)
    from flwr.app import ConfigRecord

    messages = list(strategy.configure_train(1, toys.record(toys.arrays()), ConfigRecord(), grid))
    return strategy, list(grid.send_and_receive(messages))


def test_duplicates_same_bytes_count_once_different_bytes_not_at_all(memory_grid, toys):
    strategy, replies = inbox_of(memory_grid, toys)
    strategy.aggregate_train(1, [*replies, replies[0]])
    assert strategy.outcome.measurements["accepted"] == 3
    assert strategy.outcome.measurements["duplicates"] == 1

    strategy, replies = inbox_of(memory_grid, toys)
    other = Message(
        RecordDict(
            {**dict(replies[0].content.items()), "metrics": MetricRecord({"num-examples": 999})}
        ),
        reply_to=as_instruction(replies[0]),
    )
    stamp(other, src_node_id=replies[0].metadata.src_node_id)
    strategy.aggregate_train(1, [*replies, other])
    assert strategy.outcome.measurements["accepted"] == 2
    assert [r.reason for r in strategy.outcome.rejections] == ["duplicate"]


def test_flowers_own_loop_drives_the_strategy_too(memory_grid, toys):
    words = {"seed": 7, "fraction_evaluate": 0.0}
    ours, _ = run(memory_grid(toys.app(), 3), toys, 2)
    flowers = Strategy.start(
        DareStrategy(**words), memory_grid(toys.app(), 3), toys.record(toys.arrays()), 2
    )
    for name, array in numpy_of(ours.arrays).items():
        assert array.tobytes() == numpy_of(flowers.arrays)[name].tobytes()


def test_an_unknown_order_is_refused_and_other_messages_pass(memory_grid, toys):
    from flwr.app import ConfigRecord

    from dare_agg.flower.records import ORDER_KEY

    context = Context(1, 2, {"partition-id": 0}, RecordDict(), {})
    message = Message(RecordDict({ORDER_KEY: ConfigRecord({"ask": "launch"})}), 2, "train")
    reply = dare_mod(message, context, lambda m, c: pytest.fail("must not train"))
    assert reply.content[REPLY_KEY]["refused"] == "version"


def test_an_app_that_returns_no_arrays_is_told_so(memory_grid, toys):
    app = ClientApp(mods=[dare_mod])

    @app.train()
    def train(msg, context):
        return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1})}), reply_to=msg)

    with pytest.raises(RunError, match="return the trained arrays"):
        run(memory_grid(app, 2), toys, 1)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"method": "tie"}, "did you mean 'ties'"),
        ({"server_step": "adm"}, "did you mean 'adam'"),
        ({"fraction_train": 1.5}, "fraction_train"),
        ({"min_train_nodes": -1}, "min_train_nodes"),
        ({"deadline": 0}, "deadline"),
        ({"seed": -1}, "seed"),
        ({"drop_rate": "1.0"}, r"drop rate 1\.0 is outside \[0, 1\)"),
    ],
)
def test_settings_fail_before_anything_runs(words, says):
    with pytest.raises(ConfigError, match=says):
        DareStrategy(**words)


def test_the_strategy_takes_fedavgs_words():
    import inspect

    fedavg = list(inspect.signature(FedAvg.__init__).parameters)
    ours = list(inspect.signature(DareStrategy.__init__).parameters)
    assert ours[: len(fedavg)] == fedavg
    assert strategy_module.DareStrategy is DareStrategy

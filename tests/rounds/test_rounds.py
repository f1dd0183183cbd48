"""A round without a network: identity, unbiasedness, order, and every rejection."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dare_agg.codec.budget import ClientTerms
from dare_agg.codec.mask import parse_drop_rate
from dare_agg.codec.update import encode_update
from dare_agg.errors import BaseMismatchError, ConfigError, LayoutError, NonFiniteError, UpdateError
from dare_agg.merge.methods import federated_methods, find_method
from dare_agg.rounds.client import make_client_update
from dare_agg.rounds.plan import make_plans
from dare_agg.rounds.server import (
    Accepted,
    Rejection,
    advance,
    check_reply,
    check_weight,
    merge_round,
)
from dare_agg.rounds.settings import FederatedSettings
from dare_agg.rounds.statistics import KINDS, encode_statistics
from dare_agg.rounds.step import StepState, server_step
from dare_agg.rounds.terms import UpdateTerms
from dare_agg.vectors.model import global_model

SIZE = 2000
WEIGHTS = (30, 10, 20)


def base_arrays() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        "encoder": generator.normal(size=(40, 50)).astype(np.float32),
        "head": generator.normal(size=30).astype(np.float32),
        "mine": generator.normal(size=7).astype(np.float32),
    }


def tuned_arrays(client: int, same: bool = False) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(1000 if same else 1000 + client)
    return {
        name: array + generator.normal(0.001, 0.003, size=array.shape).astype(np.float32)
        for name, array in base_arrays().items()
    }


def settings_of(**words) -> FederatedSettings:
    return settings_from({"dense": ("head",), "exclude": ("mine",), **words})


def settings_from(words) -> FederatedSettings:
    of_terms = {key: words[key] for key in words if key in UpdateTerms.__dataclass_fields__}
    rest = {key: words[key] for key in words if key not in of_terms}
    return FederatedSettings(UpdateTerms(**of_terms), **rest)


def play(settings, seed=0, terms=(None, None, None), same=False):
    """One round of three clients; returns model, plans, accepted replies."""
    agreed = settings.terms
    model = global_model(base_arrays(), dense=agreed.dense, exclude=agreed.exclude)
    secret = seed.to_bytes(32, "little")
    plans = make_plans(secret, 1, terms, agreed, model.ref)
    accepted = []
    for client, plan in enumerate(plans):
        update = make_client_update(plan, base_arrays(), tuned_arrays(client, same))
        reply = check_reply(plan, update.blob, update.dense_blob, WEIGHTS[client])
        assert isinstance(reply, Accepted), reply
        accepted.append(reply)
    return model, plans, accepted


def weighted_mean(name: str, weights=WEIGHTS, same=False) -> np.ndarray:
    base = base_arrays()[name].astype(np.float64)
    deltas = [tuned_arrays(client, same)[name] - base for client in range(3)]
    return np.average([delta.reshape(-1) for delta in deltas], axis=0, weights=weights)


@pytest.mark.parametrize("method", ["task-arithmetic", "average"])
@pytest.mark.parametrize("weighting", ["examples", "equal"])
def test_without_dropping_a_round_is_federated_averaging(method, weighting):
    settings = settings_of(
        method=method, weighting=weighting, drop_rate=0, values="f32", dense_values="f32"
    )
    model, _, accepted = play(settings)
    merged = merge_round(model, accepted, settings)
    weights = WEIGHTS if weighting == "examples" else (1, 1, 1)
    np.testing.assert_allclose(merged.delta, weighted_mean("encoder", weights), atol=1e-7)
    np.testing.assert_allclose(merged.dense, weighted_mean("head", weights), atol=1e-7)


@pytest.mark.parametrize("mask", ["stratified", "bernoulli"])
@pytest.mark.parametrize("values", ["f32", "b1"])
def test_a_dropped_round_is_unbiased_with_mixed_drop_rates(mask, values):
    settings = settings_of(values=values, mask=mask, drop_rate="0.9", dense_values="b1")
    terms = (None, ClientTerms(parse_drop_rate("0.5"), "b1"), ClientTerms(parse_drop_rate(0), "i8"))
    draws = []
    for seed in range(150):
        model, _, accepted = play(settings, seed, terms)
        draws.append(merge_round(model, accepted, settings).delta)
    expected = weighted_mean("encoder")
    mean, spread = np.mean(draws, axis=0), np.std(draws, axis=0) / np.sqrt(len(draws))
    # A bias shows as a mean error well above its standard error over all elements.
    error = np.linalg.norm(mean - expected)
    assert error < 1.3 * np.linalg.norm(spread)
    assert abs(float((mean - expected) @ expected) / float(expected @ expected)) < 0.06


def test_ties_with_the_expected_count_keeps_the_scale_of_equal_deltas():
    settings = settings_of(method="ties", values="f32", drop_rate="0.9", weighting="equal")
    draws = [
        merge_round(*(lambda m, p, a: (m, a, settings))(*play(settings, seed, same=True))).delta
        for seed in range(200)
    ]
    expected = weighted_mean("encoder", same=True)
    scale = float(np.mean(draws, axis=0) @ expected) / float(expected @ expected)
    assert scale == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("method", ["task-arithmetic", "ties"])
def test_arrival_order_does_not_matter(method):
    settings = settings_of(method=method)
    model, _, accepted = play(settings)
    first = merge_round(model, accepted, settings)
    second = merge_round(model, accepted[::-1], settings)
    third = merge_round(model, [accepted[1], accepted[2], accepted[0]], settings)
    for other in (second, third):
        assert first.delta.tobytes() == other.delta.tobytes()
        assert first.dense.tobytes() == other.dense.tobytes()
        assert first.weights == other.weights


def test_tiles_and_threads_do_not_matter():
    settings = settings_of(method="ties")
    model, _, accepted = play(settings)
    first = merge_round(model, accepted, settings).delta
    # Sparse updates get larger tiles than asked for, by their number and the threads.
    for tile, threads in ((128, 3), (16, 1), (1 << 20, 2)):
        again = merge_round(model, accepted, replace(settings, tile=tile, threads=threads)).delta
        assert first.tobytes() == again.tobytes()


def test_the_model_moves_and_clients_agree_on_the_new_base():
    settings = settings_of(server_step=server_step("momentum"))
    model, _, accepted = play(settings)
    merged = merge_round(model, accepted, settings)
    moved, state = advance(model, StepState(), merged, settings)
    assert state.count == 1
    assert np.array_equal(moved.arrays()["mine"], base_arrays()["mine"])
    terms = settings.terms
    received = global_model(moved.arrays(), dense=terms.dense, exclude=terms.exclude)
    assert received.ref == moved.ref != model.ref


def test_measurements_count_what_was_sent():
    settings = settings_of()
    model, _, accepted = play(settings)
    measured = merge_round(model, accepted, settings).measurements
    assert measured["survivors"] == [200, 200, 200]
    assert measured["survivors_per_element"] == pytest.approx(0.3)
    assert measured["weights"] == pytest.approx([0.5, 1 / 6, 1 / 3])


# --- what a client refuses -----------------------------------------------------------------


def test_another_base_is_refused():
    _, (plan, *_), _ = play(settings_of())
    other = base_arrays()
    other["encoder"][0, 0] += 1e-3
    with pytest.raises(BaseMismatchError, match="fetch the global model again"):
        make_client_update(plan, other, tuned_arrays(0))


def test_another_model_is_refused():
    _, (plan, *_), _ = play(settings_of())
    other = {**base_arrays(), "encoder": np.zeros((3, 3), np.float32)}
    with pytest.raises(LayoutError, match="other names or shapes"):
        make_client_update(plan, other, other)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["encoder", "head"])
def test_a_diverged_training_is_refused_naming_the_tensor(bad, name):
    _, (plan, *_), _ = play(settings_of())
    tuned = tuned_arrays(0)
    tuned[name].reshape(-1)[5] = bad
    with pytest.raises(NonFiniteError, match=name):
        make_client_update(plan, base_arrays(), tuned)


def test_local_tensors_may_be_missing_or_changed_but_strangers_are_refused():
    _, (plan, *_), _ = play(settings_of())
    tuned = tuned_arrays(0)
    blob = make_client_update(plan, base_arrays(), tuned).blob
    tuned["mine"] = np.full(99, np.nan, np.float32)
    tuned["mine.too"] = np.zeros(3, np.float32)
    assert make_client_update(plan, base_arrays(), tuned).blob == blob
    del tuned["mine"]
    assert make_client_update(plan, base_arrays(), tuned).blob == blob
    with pytest.raises(LayoutError, match="'extra'"):
        make_client_update(plan, base_arrays(), {**tuned, "extra": np.zeros(2, np.float32)})


# --- what the server rejects ---------------------------------------------------------------


def reply_to(plan, **changes):
    update = make_client_update(plan, base_arrays(), tuned_arrays(0))
    arguments = {"blob": update.blob, "dense_blob": update.dense_blob, "weight": 10, **changes}
    return check_reply(plan, **arguments)


@pytest.mark.parametrize(
    "weight",
    [-79, float("nan"), float("inf"), True, False, "10", None, 2**63, 2**53 + 2, 2.0**54, [1]],
)
def test_absurd_weights_are_rejected(weight):
    _, (plan, *_), _ = play(settings_of())
    rejected = reply_to(plan, weight=weight)
    assert isinstance(rejected, Rejection) and rejected.reason == "weight"


@pytest.mark.parametrize("values", ["f32", "bf16", "b1"])
@pytest.mark.parametrize("group", ["blob", "dense_blob"])
def test_a_reply_of_values_that_no_training_produces_is_rejected(values, group):
    settings = settings_of(values=values, dense_values=values)
    _, (plan, *_), _ = play(settings)
    spec = plan.spec() if group == "blob" else plan.dense_spec()
    huge = encode_update(
        replace(spec, most=np.float32(np.inf)), np.full(spec.size, 2.0**60, np.float32)
    )
    rejected = reply_to(plan, **{group: huge})
    assert isinstance(rejected, Rejection) and rejected.reason == "non-finite"
    assert "magnitude <= 1.04858e+06" in rejected.detail


def test_real_weights_pass():
    assert check_weight(1, 1e7) == 1.0
    assert check_weight(0.5, 1e7) == 0.5
    assert check_weight(10**7, 1e7) == 1e7
    assert check_weight(2**53, UpdateTerms().max_weight) == 2.0**53


@pytest.mark.parametrize("weight", [0, 0.0, -0.0])
def test_no_examples_is_a_reason_of_its_own(weight):
    with pytest.raises(UpdateError, match="0 examples, and counts for nothing") as caught:
        check_weight(weight, 1e7)
    assert caught.value.reason == "no-examples"


@pytest.mark.parametrize(
    ("weight", "says"),
    [
        (-1, "weight -1 is no number of examples; report how many it trained on"),
        (float("nan"), "weight nan is no number of examples"),
        (10**7 + 1, "weight 10000001 is above 10000000; raise max_weight"),
    ],
)
def test_an_absurd_weight_is_told_why(weight, says):
    with pytest.raises(UpdateError, match=says):
        check_weight(weight, 1e7)


def test_damaged_payloads_are_rejected_with_a_reason():
    _, (plan, *_), _ = play(settings_of(values="f32"))
    update = make_client_update(plan, base_arrays(), tuned_arrays(0))
    flipped = bytearray(update.blob)
    flipped[-1] ^= 1
    for blob in (
        b"",
        update.blob[:10],
        update.blob[:-1],
        update.blob + b"\0",
        bytes(flipped),
        update.dense_blob,
    ):
        assert isinstance(reply_to(plan, blob=blob), Rejection)
    assert reply_to(plan, dense_blob=None).reason == "truncated"
    assert isinstance(reply_to(plan, dense_blob=update.blob), Rejection)


@pytest.mark.parametrize(
    "change",
    [
        {"round": 2},
        {"run": "another"},
        {"client": 5},
        {"rank": 3},
        {"mask_key": bytes(16)},
        {"values_key": bytes(16)},
        {"mask": "bernoulli"},
        {"values": "f16"},
        {"drop_rate": parse_drop_rate("0.5")},
    ],
)
def test_an_update_fits_its_own_plan_alone(change):
    _, (plan, *_), _ = play(settings_of())
    update = make_client_update(plan, base_arrays(), tuned_arrays(0))
    own = {key: change[key] for key in change if key in UpdateTerms.__dataclass_fields__}
    other = replace(plan, **(change if not own else {"terms": replace(plan.terms, **own)}))
    assert isinstance(check_reply(other, update.blob, update.dense_blob, 10), Rejection)


def test_another_base_or_layout_is_named():
    _, (plan, *_), _ = play(settings_of())
    update = make_client_update(plan, base_arrays(), tuned_arrays(0))
    for change, reason in (({"base": "00" * 32}, "base"), ({"layout": "00" * 32}, "layout")):
        other = replace(plan, model=replace(plan.model, **change))
        # The digest changes too; the header's own fields are looked at first.
        rejected = check_reply(other, update.blob, update.dense_blob, 10)
        assert isinstance(rejected, Rejection) and rejected.reason == reason


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"method": "tie"}, "did you mean 'ties'"),
        ({"values": "b3"}, "value format"),
        ({"mask": "random"}, "mask"),
        ({"weighting": "example"}, "did you mean 'examples'"),
        ({"drop_rate": 1.0}, r"drop rate 1\.0 is outside \[0, 1\)"),
        ({"scaling": 0}, "above 0"),
        ({"scaling": float("nan")}, "finite"),
        ({"max_weight": True}, "number"),
        ({"weight_bound": 0.5}, "at least 1 is needed, or 0 for no bound"),
        ({"weight_bound": -1}, "above 0"),
        ({"weight_bound": float("nan")}, "finite"),
        ({"weight_bound": False}, "number"),
        ({"exclude": "head"}, "list of patterns"),
    ],
)
def test_settings_are_checked_when_made(words, says):
    with pytest.raises(ConfigError, match=says):
        settings_from(words)


def test_a_plan_that_asks_for_unknown_statistics_is_refused():
    model, (plan, *_), _ = play(settings_of())
    found = {"encoder": np.ones((40, 50), np.float32)}
    with pytest.raises(UpdateError, match="did you mean 'fisher'") as caught:
        encode_statistics(
            replace(plan, terms=replace(plan.terms, statistics="fischer")),
            model.groups.layout,
            found,
        )
    assert caught.value.reason == "plan"


def test_every_kind_a_method_asks_for_can_travel():
    assert {find_method(name).statistics or "" for name in federated_methods()} == {"", *KINDS}

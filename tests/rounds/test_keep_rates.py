"""Rounds whose tensors have keep rates of their own: found by clients, or told by the plan."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dare_agg.codec.fitted_rates import tensor_squares
from dare_agg.codec.mask import parse_drop_rate
from dare_agg.codec.rates import read_table
from dare_agg.downlink.grid import grid_of
from dare_agg.downlink.steps import apply_step, families_of, payload_of, read_steps
from dare_agg.downlink.store import VersionStore
from dare_agg.downlink.ways import make_downlink
from dare_agg.errors import ConfigError, DareError, LayoutError, UpdateError
from dare_agg.rounds.client import update_of_arrays
from dare_agg.rounds.levels import levels_told
from dare_agg.rounds.noise import error_of, error_of_plan
from dare_agg.rounds.plan import make_plans, plan_from_record
from dare_agg.rounds.server import Accepted, Rejection, advance, check_reply, merge_round
from dare_agg.rounds.settings import FederatedSettings
from dare_agg.rounds.step import StepState, state_from_arrays, state_to_arrays
from dare_agg.rounds.streamed import advance_streamed
from dare_agg.rounds.terms import UpdateTerms
from dare_agg.vectors.model import global_model

RMS = {"body": 1e-4, "late": 1e-3, "head": 2e-2, "still": 0.0}
SHAPES = {"body": (120, 50), "late": (40, 20), "head": (10, 10), "still": (700,)}
CLIENTS = 4


def model_of():
    rng = np.random.default_rng(0)
    arrays = {n: rng.normal(size=shape).astype(np.float32) for n, shape in SHAPES.items()}
    return global_model({**arrays, "shared": np.ones(9, np.float32)}, dense=["shared"])


def delta_of(model, number, client):
    rng = np.random.default_rng([number, client])
    shared = np.random.default_rng([number, 99])
    parts = [
        (rng.normal(size=entry.size) + shared.normal(size=entry.size)) * RMS[entry.name]
        for entry in model.groups.layout.entries
    ]
    return np.concatenate(parts).astype(np.float32)


def settings_of(keep_rates, **words):
    terms = {k: words.pop(k) for k in ("drop_rate", "values") if k in words}
    terms = {"drop_rate": "0.9", "values": "i8", "dense": ("shared",), **terms}
    return FederatedSettings(UpdateTerms(keep_rates=keep_rates, **terms), **words)


def plans_of(model, settings, number=1, levels=b"", secret=b"s" * 32, clients=CLIENTS):
    return make_plans(
        secret, number, [None] * clients, settings.terms, model.ref,
        layout=model.groups.layout, levels=levels,
    )  # fmt: skip


def answered(model, plan, number=1):
    delta = delta_of(model, number, plan.client)
    tuned = {
        entry.name: model.arrays()[entry.name]
        + delta[entry.offset : entry.stop].reshape(entry.shape)
        for entry in model.groups.layout.entries
    }
    update = update_of_arrays(plan, model, tuned)
    reply = check_reply(plan, update.blob, update.dense_blob, 1.0, layout=model.groups.layout)
    assert isinstance(reply, Accepted), reply
    return reply, update


def played(model, settings, number=1, levels=b"", secret=b"s" * 32):
    plans = plans_of(model, settings, number, levels, secret)
    return [answered(model, plan, number) for plan in plans]


def levels_after(model, settings, number=1):
    replies = [reply for reply, _ in played(model, settings, number)]
    merged = merge_round(model, replies, settings)
    _, state = advance(
        model, StepState(), merged, settings, None, [reply.plan for reply in replies]
    )
    return state.levels


def test_own_and_told_rates_make_less_noise_in_as_many_bytes():
    model = model_of()
    errors, sizes = {}, {}
    levels = levels_after(model, settings_of("last"))
    assert len(levels) == len(SHAPES)
    for keep in ("uniform", "own", "last"):
        settings = settings_of(keep)
        found = []
        for number in range(2, 8):
            replies = played(model, settings, number, levels if keep == "last" else b"")
            merged = merge_round(model, [reply for reply, _ in replies], settings)
            deltas = [delta_of(model, number, client) for client in range(CLIENTS)]
            wanted = np.mean(deltas, axis=0, dtype=np.float64)
            found.append(np.sum((merged.delta - wanted) ** 2) / np.sum(wanted**2))
            assert merged.measurements["survivors_per_element"] < 1.05 * CLIENTS / 10
        errors[keep], sizes[keep] = np.mean(found), len(replies[0][1].blob)
    assert errors["own"] < 0.2 * errors["uniform"]
    assert errors["last"] < 0.25 * errors["uniform"]
    assert sizes["own"] <= sizes["uniform"] and sizes["last"] <= sizes["uniform"]


@pytest.mark.parametrize("keep", ["own", "last"])
@pytest.mark.parametrize("method", ["task-arithmetic", "ties"])
def test_a_merge_of_rounds_is_unbiased(keep, method):
    """At p = 0 every method gives what it gives for whole deltas; the mean does at any rate."""
    model = model_of()
    whole = settings_of(keep, method=method, drop_rate="0", values="f32")
    uniform = settings_of("uniform", method=method, drop_rate="0", values="f32")
    found, wanted = (
        merge_round(model, [reply for reply, _ in played(model, settings)], settings).delta
        for settings in (whole, uniform)
    )
    assert np.array_equal(found, wanted)
    if method == "ties":
        return
    settings, draws = settings_of(keep), []
    levels = levels_after(model, settings)
    for seed in range(60):
        secret = bytes([seed]) * 32
        replies = played(model, settings, 1, levels if keep == "last" else b"", secret)
        draws.append(merge_round(model, [reply for reply, _ in replies], settings).delta)
    mean, spread = np.mean(draws, axis=0), np.std(draws, axis=0) / np.sqrt(len(draws))
    assert np.linalg.norm(mean - wanted) < 1.3 * np.linalg.norm(spread)


def test_a_plan_of_one_rate_is_as_it_was_and_others_travel():
    model = model_of()
    (plain, *_) = plans_of(model, settings_of("uniform"))
    assert not {"keep-rates", "told-rates"} & plain.to_record().keys()
    levels = levels_after(model, settings_of("last"))
    for plan in (
        *plans_of(model, settings_of("own")),
        *plans_of(model, settings_of("last"), 2, levels),
    ):
        again = plan_from_record(plan.to_record())
        assert again == plan and again.digest() == plan.digest() != plain.digest()
        layout = model.groups.layout
        assert again.spec(layout) == plan.spec(layout)
        with pytest.raises(LayoutError):
            plan.spec()
    record = plan.to_record()
    assert len(record["told-rates"]) == 4 + len(SHAPES)
    with pytest.raises(UpdateError, match="told-rates"):
        plan_from_record({**record, "told-rates": bytes(1 << 18)})
    other = plan_from_record({**record, "told-rates": bytes(3)})
    with pytest.raises(UpdateError):
        other.spec(model.groups.layout)


def test_ranks_of_a_told_round_are_disjoint_in_every_tensor_with_room():
    model = model_of()
    levels = levels_after(model, settings_of("last"))
    plans = plans_of(model, settings_of("last"), 2, levels)
    assert len({plan.told for plan in plans}) == 1
    rates = read_table(plans[0].told, len(SHAPES))
    num, den = rates.strides
    masks = [plan.spec(model.groups.layout).draw_mask() for plan in plans]
    for entry, n, d in zip(model.groups.layout.entries, num, den, strict=True):
        if n // d >= CLIENTS:
            # Cut strata at a tensor's end may be narrower than there are ranks.
            stop = entry.offset + int(entry.size * d // n * n // d)
            at = np.concatenate([mask.indices(entry.offset, stop) for mask in masks])
            assert np.unique(at).size == at.size


def test_an_update_beyond_its_plans_bytes_or_of_another_plan_is_refused():
    model = model_of()
    layout = model.groups.layout
    dense = settings_of("own", drop_rate="0.5")
    sparse = settings_of("own", drop_rate="0.99")
    (few, *_), (many, *_) = plans_of(model, sparse), plans_of(model, dense)
    _, sent = answered(model, many)
    refused = check_reply(few, sent.blob, sent.dense_blob, 1.0, layout=layout)
    assert isinstance(refused, Rejection) and refused.reason == "shape"
    (plain, *_) = plans_of(model, settings_of("uniform", drop_rate="0.5"))
    assert check_reply(plain, sent.blob, sent.dense_blob, 1.0, layout=layout).reason == "version"


@pytest.mark.parametrize("keep", ["own", "last"])
@pytest.mark.parametrize("form", ["auto", "union-b1", "union-f32"])
def test_the_union_of_the_masks_is_drawn_again_from_a_step(keep, form):
    """Every path leads to one version, and a step's union is where the clients' survivors are."""
    settings = settings_of(keep, values="f32")
    downlink = make_downlink(form)
    model = downlink.start(model_of())
    counts = [np.zeros(model.delta.size, np.int32), np.zeros(model.dense.size, np.int32)]
    state = StepState()
    for number in range(1, 4):
        replies = [r for r, _ in played(model, settings, number, state.levels)]
        plans = [reply.plan for reply in replies]
        merged = merge_round(model, replies, settings)
        model, state = advance(model, state, merged, settings, downlink, plans)
        step = downlink.steps[-1]
        assert step.head.form == "union"
        assert step.head.families == families_of(plans)
        assert all(family.table is not None for family in step.head.families)
        union = np.zeros(model.delta.size, np.bool_)
        for reply in replies:
            union |= reply.update.present(0, union.size)
        assert step.head.survivors == np.count_nonzero(union)
        (again,) = read_steps(step.body, step.dense)
        assert again == step and payload_of(again) == payload_of(step)
        delta, dense = downlink._groups()
        apply_step(again, delta.grid, counts[0], dense.grid, counts[1])
        assert np.array_equal(counts[0], delta.counts)
    if keep == "last":
        assert len(state.levels) == len(SHAPES)
    body = bytearray(step.body)
    for cut in (150, 190, 250):
        with pytest.raises(DareError):
            read_steps(bytes(body[:cut]), step.dense)
    other = global_model({"body": np.ones(50, np.float32)})
    with pytest.raises(UpdateError):
        grid = grid_of(other.groups.layout, other.delta)
        apply_step(step, grid, np.zeros(50, np.int32), grid, np.zeros(50, np.int32))


def test_levels_of_a_merged_change_are_those_of_the_clients():
    model = model_of()
    for drop_rate in ("0", "0.9", "0.99"):
        settings = settings_of("last", drop_rate=drop_rate, values="f32")
        marks = np.frombuffer(levels_after(model, settings), np.uint8).astype(int)
        names = [entry.name for entry in model.groups.layout.entries]
        marks = dict(zip(names, marks.tolist(), strict=True))
        # Four levels an octave; a tensor that stood still is held above nothing.
        assert abs(marks["late"] - marks["body"] - 4 * np.log2(10)) <= 5
        assert abs(marks["head"] - marks["late"] - 4 * np.log2(20)) <= 5
        assert marks["still"] > 0
    assert levels_told((3,), np.zeros(1), ()) == b""


def test_levels_do_not_drift_from_round_to_round():
    """The noise of one round's rates is not what sets the next ones'."""
    model, settings = model_of(), settings_of("last", drop_rate="0.98", values="b1")
    levels, found = b"", []
    for number in range(1, 9):
        replies = [reply for reply, _ in played(model, settings, number, levels)]
        merged = merge_round(model, replies, settings)
        squares = tensor_squares(model.groups.layout.sizes, merged.delta)
        levels = levels_told(model.groups.layout.sizes, squares, [reply.plan for reply in replies])
        found.append(np.frombuffer(levels, np.uint8).astype(int))
    assert np.abs(found[-1] - found[0]).max() <= 8
    assert np.abs(found[-1] - found[-2]).max() <= 6


def test_the_state_keeps_the_levels():
    state = StepState(3, {}, b"\x01\x50\x00")
    assert state_from_arrays(state_to_arrays(state)) == state
    assert state_from_arrays(state_to_arrays(StepState(1))) == StepState(1)
    bad = {**state_to_arrays(state), "levels": np.zeros((2, 2), np.uint8)}
    with pytest.raises(DareError, match="levels"):
        state_from_arrays(bad)


def test_a_round_in_one_pass_is_the_round_of_vectors(tmp_path):
    settings = settings_of("last")
    models, states = [], []
    for place, streamed in (("a", False), ("b", True)):
        store = VersionStore(tmp_path / place)
        model, state = store.start(model_of()), StepState()
        for number in (1, 2):
            replies = [r for r, _ in played(model, settings, number, state.levels)]
            plans = [reply.plan for reply in replies]
            if streamed:
                model, state, _ = advance_streamed(model, state, replies, settings, store, plans)
                continue
            merged = merge_round(model, replies, settings)
            model, state = advance(model, state, merged, settings, store, plans)
        models.append(model.ref.version)
        states.append(state.levels)
    assert states[0] == states[1] != b""
    assert models[0] == models[1]


def test_the_error_of_a_plan_is_by_its_tensors():
    model = model_of()
    (reply, _), *_ = played(model, settings_of("own"))
    uniform = error_of(parse_drop_rate("0.9"), "i8")
    assert error_of_plan(reply.plan) < 0.2 * uniform
    assert error_of_plan(replace(reply.plan, rates=None)) == uniform
    assert reply.keep == pytest.approx(reply.update.survivors / model.delta.size)


def test_what_one_mask_for_all_needs_refuses_rates_of_each():
    for method in ("fisher", "regmean"):
        with pytest.raises(ConfigError, match="keep_rates='uniform'"):
            settings_of("own", method=method)
    with pytest.raises(ConfigError, match="stratified"):
        UpdateTerms(keep_rates="last", mask="bernoulli")
    with pytest.raises(ConfigError, match="own"):
        UpdateTerms(keep_rates="onw")

"""A round in one pass: bit for bit the round of vectors, whatever method, step, tile or threads."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dare_agg.downlink.store import VersionStore
from dare_agg.errors import MergeError, NonFiniteError, StateError
from dare_agg.merge.methods import federated_methods
from dare_agg.rounds.client import update_of_arrays
from dare_agg.rounds.plan import make_plans
from dare_agg.rounds.server import Accepted, check_reply, merge_round
from dare_agg.rounds.settings import FederatedSettings
from dare_agg.rounds.step import SERVER_STEPS, StepState, server_step
from dare_agg.rounds.streamed import advance_merged, advance_streamed
from dare_agg.rounds.terms import UpdateTerms
from dare_agg.vectors.model import GlobalModel, global_model
from dare_agg.vectors.sources import array_source

CLIENTS = 3


def base_model() -> GlobalModel:
    rng = np.random.default_rng(0)
    arrays = {
        "encoder.weight": rng.normal(size=(300, 50)).astype(np.float32),
        "head": rng.normal(size=30).astype(np.float32),
    }
    return global_model(arrays, dense=["head"])


def settings_of(method="task-arithmetic", step="plain", **words) -> FederatedSettings:
    terms = UpdateTerms(dense=("head",), drop_rate="0.9", values="i8")
    return FederatedSettings(terms, method=method, server_step=server_step(step), **words)


def replies(model, number, settings) -> list[Accepted]:
    """What clients send in a round: they move the model by something of their own."""
    base = model.arrays()
    plans = make_plans(
        b"s" * 32, number, [None] * CLIENTS, settings.terms, model.ref,
        shared_mask=settings.shared_mask,
    )  # fmt: skip
    found = []
    for plan in plans:
        rng = np.random.default_rng([number, plan.client])
        tuned = {
            name: array + rng.normal(0.001, 0.003, array.shape).astype(np.float32)
            for name, array in base.items()
        }
        statistics = None
        if kind := settings.terms.statistics:
            own = rng.random((50, 50) if kind == "gram" else (300, 50)).astype(np.float32)
            statistics = {"encoder.weight": own @ own.T if kind == "gram" else own}
        update = update_of_arrays(plan, model, tuned, statistics)
        reply = check_reply(
            plan, update.blob, update.dense_blob, plan.client + 1,
            statistics=update.statistics, layout=model.groups.layout,
        )  # fmt: skip
        assert isinstance(reply, Accepted), reply
        found.append(reply)
    return found


def by_vectors(store, settings, rounds):
    """Rounds whose merged delta and step are vectors in memory."""
    model, state, merged = store.start(base_model()), StepState(), None
    for number in range(1, rounds + 1):
        accepted = replies(model, number, settings)
        merged = merge_round(model, accepted, settings)
        state, step = settings.server_step.apply(state, merged.delta)
        plans = [reply.plan for reply in accepted]
        model = store.advance(model, step, merged.dense, plans)
    return model, state, merged


def in_one_pass(store, settings, rounds, model=None, state=None, first=1):
    model, state = model or store.start(base_model()), state or StepState()
    merged = None
    for number in range(first, rounds + 1):
        accepted = replies(model, number, settings)
        plans = [reply.plan for reply in accepted]
        model, state, merged = advance_streamed(
            model, state, accepted[::-1], settings, store, plans
        )
    return model, state, merged


@pytest.mark.parametrize("method", federated_methods())
def test_every_method_gives_the_bits_of_vectors(tmp_path, method):
    settings = settings_of(method)
    model, _, merged = by_vectors(VersionStore(tmp_path / "a"), settings, 2)
    for words in ({}, {"tile": 700, "threads": 2}):
        store = VersionStore(tmp_path / str(len(words)))
        same, state, streamed = in_one_pass(store, replace(settings, **words), 2)
        assert same.ref == model.ref and state.count == 2 and not state.vectors
        assert streamed.measurements == merged.measurements
        assert streamed.weights == merged.weights
        store.close()


@pytest.mark.parametrize("step", SERVER_STEPS)
def test_every_server_step_gives_the_bits_of_vectors(tmp_path, step):
    settings = settings_of(step=step, threads=2)
    one, two = VersionStore(tmp_path / "a"), VersionStore(tmp_path / "b")
    model, state, _ = by_vectors(one, settings, 4)
    same, _, _ = in_one_pass(two, settings, 4)
    assert same.ref == model.ref
    assert two.fingerprint() == one.fingerprint()
    found = two.moments(settings.server_step.vectors, fresh=False).read(0, model.delta.size)
    assert found.keys() == state.vectors.keys()
    for name, vector in state.vectors.items():
        np.testing.assert_array_equal(found[name], vector)


@pytest.mark.parametrize("step", ["plain", "momentum", "adam"])
def test_a_run_taken_up_goes_on_with_the_same_bits(tmp_path, step):
    settings = settings_of(step=step)
    model, _, _ = in_one_pass(VersionStore(tmp_path / "a"), settings, 5)
    store = VersionStore(tmp_path / "b")
    at, state, _ = in_one_pass(store, settings, 3)
    kept = store.state_arrays()
    # A round that the run did not live to keep.
    in_one_pass(store, settings, 4, at, state, first=4)
    store.close()
    again = VersionStore(tmp_path / "b")
    at = again.restore(base_model(), kept)
    same, _, _ = in_one_pass(again, settings, 5, at, state, first=4)
    assert same.ref == model.ref


def test_another_server_step_than_the_runs_is_refused(tmp_path):
    store = VersionStore(tmp_path)
    model, state, _ = in_one_pass(store, settings_of(step="momentum"), 2)
    for step in ("plain", "adam"):
        with pytest.raises(StateError, match="resume with the server step"):
            in_one_pass(store, settings_of(step=step), 3, model, state, first=3)
    with pytest.raises(StateError, match="resume both"):
        in_one_pass(store, settings_of(step="momentum"), 3, model, StepState(3), first=3)
    in_one_pass(store, settings_of(step="momentum"), 3, model, state, first=3)


def test_nothing_accepted_and_no_number_leave_the_store(tmp_path):
    settings = settings_of(step="momentum")
    store, plain = VersionStore(tmp_path / "a"), VersionStore(tmp_path / "b")
    model, state, _ = in_one_pass(store, settings, 2)
    accepted = replies(model, 3, settings)
    plans = [reply.plan for reply in accepted]
    with pytest.raises(MergeError):
        advance_streamed(model, state, [], settings, store, plans)
    wrong = np.zeros(model.delta.size, np.float32)
    wrong[-1] = np.inf
    broken = [replace(accepted[0], update=array_source(wrong)), *accepted[1:]]
    with pytest.raises(NonFiniteError, match="server step"):
        advance_streamed(model, state, broken, settings, store, plans)
    same, _, _ = in_one_pass(store, settings, 4, store.model, state, first=3)
    assert same.ref == in_one_pass(plain, settings, 4)[0].ref


def test_a_delta_merged_elsewhere_moves_the_store_the_same(tmp_path):
    settings = settings_of(step="momentum")
    one, two = VersionStore(tmp_path / "a"), VersionStore(tmp_path / "b")
    model, other = one.start(base_model()), two.start(base_model())
    accepted = replies(model, 1, settings)
    plans = [reply.plan for reply in accepted]
    merged = merge_round(model, accepted, settings)
    model, _, _ = advance_streamed(model, StepState(), accepted, settings, one, plans)
    other, state = advance_merged(
        other, StepState(), array_source(merged.delta), merged.dense, settings, two, plans
    )
    assert other.ref == model.ref and state.count == 1

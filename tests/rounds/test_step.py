"""Server steps against their formulas, their determinism and their errors."""

from __future__ import annotations

import numpy as np
import pytest

from dare_agg.errors import ConfigError, StateError
from dare_agg.rounds.server_steps import SERVER_STEPS
from dare_agg.rounds.step import StepState, server_step, state_from_arrays, state_to_arrays


def deltas(rounds: int, size: int = 70_001) -> list[np.ndarray]:
    generator = np.random.default_rng(5)
    return [generator.normal(size=size).astype(np.float32) * 0.01 for _ in range(rounds)]


def test_plain_at_rate_one_is_the_delta_itself():
    (delta,) = deltas(1)
    state, step = server_step("plain").apply(StepState(), delta)
    assert np.array_equal(step, delta)
    assert state.count == 1


def test_momentum_follows_its_formula():
    step_of = server_step("momentum", lr=0.5, beta=0.8)
    state, velocity = StepState(), np.zeros(70_001)
    for delta in deltas(4):
        state, step = step_of.apply(state, delta)
        velocity = 0.8 * velocity + delta
        np.testing.assert_allclose(step, 0.5 * velocity, rtol=1e-5, atol=1e-8)


def test_adam_follows_its_formula():
    step_of = server_step("adam", lr=0.02, beta1=0.9, beta2=0.99, tau=1e-3)
    state, first, second = StepState(), np.zeros(70_001), np.zeros(70_001)
    for count, delta in enumerate(deltas(5), start=1):
        state, step = step_of.apply(state, delta)
        first = 0.9 * first + 0.1 * delta.astype(np.float64)
        second = 0.99 * second + 0.01 * delta.astype(np.float64) ** 2
        rate = 0.02 * np.sqrt(1 - 0.99**count) / (1 - 0.9**count)
        expected = rate * first / (np.sqrt(second) + 1e-3)
        np.testing.assert_allclose(step, expected, rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize("name", SERVER_STEPS)
def test_state_survives_a_file_and_gives_the_same_bits(name):
    step_of = server_step(name)
    state = StepState()
    for delta in deltas(2):
        state, _ = step_of.apply(state, delta)
    again = state_from_arrays(state_to_arrays(state))
    (last,) = deltas(1)
    one, other = step_of.apply(state, last), step_of.apply(again, last)
    assert np.array_equal(one[1], other[1])
    assert one[0].count == other[0].count == 3


def test_state_in_is_not_changed():
    step_of = server_step("momentum")
    first, second = deltas(2)
    state, _ = step_of.apply(StepState(), first)
    before = state.vectors["velocity"].copy()
    step_of.apply(state, second)
    assert np.array_equal(state.vectors["velocity"], before)


@pytest.mark.parametrize(
    ("name", "numbers", "says"),
    [
        ("adamm", {}, "did you mean 'adam'"),
        ("adam", {"beta_1": 0.9}, "did you mean 'beta1'"),
        ("adam", {"beta1": 1.0}, r"\[0, 1\)"),
        ("plain", {"lr": 0.0}, r"\(0, ∞\)"),
        ("plain", {"lr": float("nan")}, "nan"),
        ("momentum", {"beta": True}, "a number is needed"),
    ],
)
def test_bad_settings_name_value_and_remedy(name, numbers, says):
    with pytest.raises(ConfigError, match=says):
        server_step(name, **numbers)


def test_a_step_may_be_written_with_its_numbers():
    written = server_step("adam(beta1=0.8, tau=1e-4)")
    assert written == server_step("adam", beta1=0.8, tau=1e-4)
    assert server_step(" momentum ( beta = .5 ) ", lr=2).numbers == {"lr": 2.0, "beta": 0.5}
    assert server_step("plain()") == server_step()


@pytest.mark.parametrize(
    ("text", "numbers", "says"),
    [
        ("adm(tau=1)", {}, "did you mean 'adam'"),
        ("adam(tauu=1)", {}, "did you mean 'tau'"),
        ("adam(tau=small)", {}, "'tau=small' is no number; write tau="),
        ("adam(0.1)", {}, "is no number"),
        ("adam(tau=1, tau=2)", {}, "tau is given twice"),
        ("adam(lr=1)", {"lr": 2.0}, "lr is given again as 2"),
        ("adam(tau=nan)", {}, r"\(0, ∞\)"),
        ("adam(tau=1", {}, "cannot be read"),
        ("", {}, "cannot be read"),
    ],
)
def test_a_step_that_cannot_be_read_names_the_part(text, numbers, says):
    with pytest.raises(ConfigError, match=says):
        server_step(text, **numbers)


def test_state_of_another_step_or_model_is_refused():
    state, _ = server_step("momentum").apply(StepState(), deltas(1)[0])
    with pytest.raises(StateError, match="'first'"):
        server_step("adam").apply(state, deltas(1)[0])
    with pytest.raises(StateError, match="shape"):
        server_step("momentum").apply(state, np.zeros(3, np.float32))
    with pytest.raises(StateError, match="count"):
        state_from_arrays({"vector.velocity": np.zeros(3, np.float32)})

"""A run of the strategy that keeps its clients' privacy."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.serverapp.strategy import FedAvg

from dare_agg.downlink.ways import make_downlink
from dare_agg.errors import ConfigError, PrivacyError
from dare_agg.flower import DareStrategy, dare
from dare_agg.flower.resume import keep_base, resume, save
from dare_agg.privacy.clients import ClientPrivacy
from dare_agg.rounds.state import StateFolder

LAYERS = {"dense": ["^head"], "exclude": ["norm"]}


def strategy(privacy, **words):
    given = {
        "privacy": privacy, "weighting": "equal", "fraction_evaluate": 0.0, "seed": 1,
        "fraction_train": 0.5, "drop_rate": 0.9, **LAYERS, **words,
    }  # fmt: skip
    return DareStrategy(**given)


def _but(words, *names):
    return {name: value for name, value in words.items() if name not in names}


def run(grid, toys, privacy, rounds=3, **words):
    outcomes = []
    made = strategy(privacy, round_hook=lambda o: outcomes.append(o), **words)
    made.start(grid, toys.record(toys.arrays()), num_rounds=rounds, timeout=30)
    return outcomes


def test_a_round_is_the_clipped_noised_sum_over_a_fixed_number(memory_grid, toys):
    privacy = ClientPrivacy(1000, noise=0.05, clip=1e-3, weak=True, epsilon=1e5)
    (outcome,) = run(
        memory_grid(toys.app(), 12), toys, privacy, rounds=1, fraction_train=1.0, drop_rate=0,
        values="f32",
    )  # fmt: skip
    # Of 12 of 1,000 clients, each of norm .001 at most; noise of 5e-5 over 1,000 clients.
    assert outcome.measurements["accepted"] == 12
    assert outcome.measurements["merged_norm"] < 12 * 1e-3 / 1000 + 6e-5 / 1000 * 40
    assert outcome.measurements["merged_norm"] > 0.5e-3 / 1000
    said = outcome.measurements["privacy"]
    assert (said["noise"], said["rate"], said["releases"]) == (0.05, 1.0, 1)


def test_a_round_of_nobody_releases_noise_and_is_charged(memory_grid, toys):
    privacy = ClientPrivacy(50, noise=1.0)
    outcomes = run(memory_grid(toys.app(), 3), toys, privacy, rounds=2, fraction_train=1e-6)
    assert [o.measurements["accepted"] for o in outcomes] == [0, 0]
    assert all(o.measurements["merged_norm"] > 0 for o in outcomes)
    assert [o.measurements["privacy"]["releases"] for o in outcomes] == [1, 2]


def test_a_client_that_fails_changes_the_sum_and_nothing_else(memory_grid, toys):
    def fail(partition, arrays, metrics):
        if partition == 2:
            raise ValueError("no")

    privacy = ClientPrivacy(50, noise=1.0)
    whole, less = (
        run(memory_grid(toys.app(edit=edit), 5), toys, privacy, 1, fraction_train=1.0)
        for edit in (None, fail)
    )
    assert whole[0].measurements["accepted"] == 5
    assert less[0].measurements["accepted"] == 4
    assert len(set(whole[0].measurements["weights"] + less[0].measurements["weights"])) == 1


def test_the_run_ends_when_its_budget_is_spent(memory_grid, toys, tmp_path, caplog):
    # Noise for three rounds of ε = 8; ten are asked for. Of twenty clients a round draws some: of
    # a few it may draw none, and then another mask is the same sum.
    noise = ClientPrivacy(50, epsilon=8.0).begin(3, 0.5).budget.noise
    privacy = ClientPrivacy(50, epsilon=8.0, noise=noise, ledger=tmp_path / "budget")
    outcomes = run(memory_grid(toys.app(), 20), toys, privacy, rounds=10)
    assert len(outcomes) == 3
    assert outcomes[-1].measurements["privacy"]["epsilon"] <= 8.0
    # The first round made again, to the bit, is no release; with another mask it is one.
    (again,) = run(memory_grid(toys.app(), 20), toys, privacy, rounds=1)
    assert again.measurements["privacy"]["releases"] == 3
    np.testing.assert_array_equal(again.model.delta, outcomes[0].model.delta)
    with pytest.raises(PrivacyError, match="more than ε = 8"):
        run(memory_grid(toys.app(), 20), toys, privacy, rounds=1, seed=2)


def test_clients_that_come_apart_train_in_turn(memory_grid, toys, tmp_path):
    trained = []
    app = toys.app(edit=lambda partition, arrays, metrics: trained.append(partition))
    privacy = ClientPrivacy(12, apart=3, noise=5.0, ledger=tmp_path / "budget")
    outcomes = run(memory_grid(app, 12), toys, privacy, rounds=8, fraction_train=0.25)
    assert [o.measurements["accepted"] for o in outcomes] == [3] * 8
    for number in range(6):  # any three rounds have nine clients
        assert len(set(trained[3 * number : 3 * number + 9])) == 9
    assert {len(set(trained[:12])), len(set(trained[12:]))} == {12}
    spent = [o.measurements["privacy"]["epsilon"] for o in outcomes]
    assert spent[0] == spent[2] < spent[3] == spent[5] < spent[6]
    # A run begun again with the budget, and without its state: nobody is taken in too early.
    before = trained[-6:]
    (again,) = run(memory_grid(app, 12), toys, privacy, rounds=1, fraction_train=0.25)
    assert not set(trained[-3:]) & set(before)
    assert again.measurements["privacy"]["releases"] == 9


def test_an_app_that_chooses_for_itself_cannot_take_a_client_in_too_early(memory_grid, toys):
    """An attack: the same clients every round, by an override of who is asked."""
    made = strategy(ClientPrivacy(12, apart=3, noise=5.0), fraction_train=0.25)
    made.private.drawn = lambda number, clients: list(clients)[:3]
    with pytest.raises(PrivacyError, match="twice within 3 rounds"):
        made.start(memory_grid(toys.app(), 12), toys.record(toys.arrays()), num_rounds=2)
    assert len(made.private.run.budget.charges) == 1


@pytest.mark.parametrize("apart", [0, 2])
@pytest.mark.parametrize("downlink", ["full", "auto"])
def test_stopping_and_going_on_changes_nothing(memory_grid, toys, tmp_path, downlink, apart):
    words = {"apart": apart} if apart else {"quantile": 0.5}

    def one_run(name, stop_after=None, rounds=4):
        kept = StateFolder(tmp_path / name)
        # The seed of the noise is drawn; for a comparison it is one.
        privacy = ClientPrivacy(50, **words, ledger=tmp_path / f"{name}.budget")
        made = strategy(
            privacy,
            downlink=make_downlink(downlink),
            round_hook=lambda o: bool(save(made, kept, o)) or o.round == stop_after,
        )
        found = resume(made, kept)
        if found is None:
            initial, start, state = toys.record(toys.arrays()), 1, None
            keep_base(kept, initial)
        else:
            initial, start, state = found.arrays, found.round + 1, found.step_state
        made.start(
            memory_grid(toys.app(), 6), initial, num_rounds=rounds, start_round=start,
            step_state=state,
        )  # fmt: skip
        return made

    first = ClientPrivacy(50, **words, ledger=tmp_path / "a.budget").begin(4, 0.5)
    (tmp_path / "b.budget").write_bytes((tmp_path / "a.budget").read_bytes())
    assert first.budget.charges == ()
    whole = one_run("a")
    one_run("b", stop_after=2)
    resumed = one_run("b")
    assert resumed.outcome.model.ref.version == whole.outcome.model.ref.version
    assert resumed.private.run.budget.charges == whole.private.run.budget.charges
    # Nobody goes on with a budget of before, or none.
    (tmp_path / "b.budget").unlink()
    with pytest.raises(PrivacyError, match="had made 4 releases"):
        one_run("b", rounds=6)


def test_a_private_run_does_not_go_on_without(memory_grid, toys, tmp_path):
    kept = StateFolder(tmp_path / "state")
    made = strategy(ClientPrivacy(50, noise=2.0), round_hook=lambda o: save(made, kept, o))
    initial = toys.record(toys.arrays())
    keep_base(kept, initial)
    made.start(memory_grid(toys.app(), 3), initial, num_rounds=1)
    with pytest.raises(PrivacyError, match="is to go on without"):
        resume(strategy(None), kept)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"weighting": "examples"}, "weighting = equal"),
        ({"method": "ties"}, "task-arithmetic"),
        ({"keep_rates": "last"}, "keep_rates = uniform"),
        ({"steps": [lambda accepted, context: None]}, "leave steps out"),
        ({"client_terms": lambda hello: None}, "leave client_terms out"),
        ({"robust": "median", "byzantine": 0, "min_train_nodes": 5}, "leave robust out"),
        ({"fraction_train": 0.0}, "nobody is drawn"),
        ({"apart": 3}, "take at most 0.3333"),
    ],
)
def test_what_breaks_the_promise_is_refused_before_anyone_trains(words, said):
    with pytest.raises(ConfigError, match=said):
        strategy(ClientPrivacy(50, apart=words.get("apart", 0)), **_but(words, "apart"))


@pytest.mark.parametrize("exclude", [[], ["num_batches"]])
def test_statistics_and_counters_are_refused(memory_grid, toys, exclude):
    trained = []
    app = toys.app(edit=lambda partition, arrays, metrics: trained.append(partition))
    with pytest.raises(ConfigError, match="leave them at the clients"):
        run(memory_grid(app, 3), toys, ClientPrivacy(50, noise=2.0), 1, exclude=exclude)
    assert not trained


def test_attack_the_noise_cannot_be_taken_off_with_the_runs_seed(memory_grid, toys):
    """Whoever knows the run's public seed, its config and all updates but one learns noise."""
    privacy = ClientPrivacy(50, noise=1.0, clip=0.1)
    runs = [
        run(memory_grid(toys.app(), 5), toys, privacy, 1, fraction_train=1.0)[0] for _ in range(2)
    ]
    moved = [outcome.model.delta[:] for outcome in runs]
    kept = moved[0] != moved[1]
    assert 100 <= kept.sum() <= 103  # the mask is that of the seed
    left = (moved[0] - moved[1])[kept] * 50
    assert np.std(left) == pytest.approx(0.1 * np.sqrt(2), rel=0.3)


def test_a_wrapped_strategy_takes_no_privacy_that_nobody_would_keep():
    with pytest.raises(ConfigError, match="privacy is the wrapped strategy's own"):
        dare(FedAvg(), privacy=ClientPrivacy(50))

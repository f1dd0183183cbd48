"""Rounds of secure sums in which no sum lacks noise, over Flower's messages."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_secure_rounds import secure_app, stage_of, strategy_for

from dare_agg.errors import ConfigError, PrivacyError, RunError
from dare_agg.flower.resume import keep_base, resume, save
from dare_agg.flower.transport import to_numpy
from dare_agg.privacy.sharing import SharedPrivacy
from dare_agg.rounds.state import StateFolder
from dare_agg.secure.guard import honest_parties
from dare_agg.vectors.model import global_model

LAYERS = {"dense": [r"^head"], "exclude": ["norm", "num_batches"]}


@pytest.fixture(autouse=True)
def own_base(toys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stays with a party comes from its own code."""
    from dare_agg.flower import reception

    monkeypatch.setattr(reception, "_OFFERS", [lambda message, context: toys.arrays()])


def private(folder: Path, privacy: SharedPrivacy, **words: Any) -> Any:
    secure = {"privacy": privacy, **words.pop("secure", {})}
    return strategy_for(folder, secure=secure, **LAYERS, **words)


def budget_of(folder: Path, party: int) -> Path:
    return folder / f"party-{party}.budget"


def clipped_mean(toys: Any, parties: list[int], norm: float, of: int, touched: Any) -> Any:
    """The mean of what the toys learn in round 1, clipped as it is summed, without noise."""
    model = global_model(toys.arrays(), **LAYERS)
    found = np.zeros(model.delta.size)
    for party in parties:
        tuned = {
            name: a + toys.delta(name, a.shape, party, 1) if a.dtype.kind == "f" else a
            for name, a in toys.arrays().items()
        }
        moved = global_model(tuned, **LAYERS)
        delta = 2.0 * np.where(touched, moved.delta - model.delta, 0)
        whole = math.hypot(np.linalg.norm(delta), np.linalg.norm(moved.dense - model.dense))
        found += delta * min(1.0, norm / whole)
    return found / of


@pytest.mark.parametrize("gone", [0, 2])
def test_a_round_is_the_clipped_mean_within_its_noise(
    memory_grid: Any, toys: Any, keys: Any, gone: int
) -> None:
    """All of them, and down to the threshold; the cohort divides in both."""
    folder = keys(7)

    def vanish(partition: int, reply: Any) -> Any:
        late = not reply.has_error() and stage_of(reply) == "contribute" and partition < gone
        return None if late else reply

    grid = memory_grid(secure_app(toys), 7, tamper=vanish)
    seen: list[Any] = []
    privacy = SharedPrivacy(epsilon=45.0, clip=0.05)
    strategy = private(folder, privacy, stage_seconds=2, round_hook=seen.append)
    result = strategy.start(grid, toys.record(toys.arrays()), num_rounds=1)
    measured = seen[0].measurements
    assert measured["accepted"] == 7 - gone >= measured["secure"]["threshold"] == 5
    before = global_model(toys.arrays(), **LAYERS)
    step = global_model(to_numpy(result.arrays), **LAYERS).delta - before.delta
    touched = step != 0
    assert 0.4 < touched.mean() < 0.55
    plain = clipped_mean(toys, list(range(gone, 7)), 0.05, 7, touched)
    rest = (step - plain)[touched]
    # Of noise multiplier z over those who are counted, the five who must stay less one who may
    # collude: the sum has z²·C²·alive/4 and the mean a 7th of its deviation; rounded vectors are
    # a little longer.
    z = measured["privacy"]["noise"]
    deviation = z * 0.05 * math.sqrt((7 - gone) / 4) / 7
    assert 0.9 < rest.std() / deviation < 1.2
    assert abs(rest.mean()) < 5 * deviation / math.sqrt(rest.size)
    # And the parties' own is in it: closer to the plain mean than to its negative.
    assert np.dot(step, plain) > 0
    # Nothing that left a party holds its delta, its examples, its loss or what it clipped.
    assert not any(any(reply.content.metric_records.values()) for reply in grid.received)
    assert measured["examples"] == measured["delta_norms"] == measured["delta_max"] == []
    assert "clipped_share" not in measured["secure"]
    assert measured["privacy"]["epsilon"] <= 45.0


def test_every_round_is_charged_to_server_and_parties_and_the_run_ends(
    memory_grid: Any, toys: Any, keys: Any, tmp_path: Path
) -> None:
    folder = keys(4)
    privacy = SharedPrivacy(epsilon=8.0, ledger=tmp_path / "privacy.budget")
    noise = privacy.begin(2, 4).budget.noise  # of two rounds; five are asked for
    seen: list[Any] = []
    strategy = private(folder, privacy, round_hook=seen.append)
    strategy.start(memory_grid(secure_app(toys), 4), toys.record(toys.arrays()), num_rounds=5)
    assert [one.measurements["privacy"]["releases"] for one in seen] == [1, 2]
    spent = seen[-1].measurements["privacy"]
    assert 7.9 < spent["epsilon"] <= 8.0 and spent["noise"] == noise
    assert len({budget_of(folder, party).read_bytes() for party in range(4)}) == 4
    assert strategy.noised.run.statement()["releases"] == 2
    with pytest.raises(PrivacyError, match="more than ε = 8"):
        private(folder, privacy).start(
            memory_grid(secure_app(toys), 4), toys.record(toys.arrays()), num_rounds=1
        )


def test_parties_refuse_a_server_that_forgets_what_it_spent(
    memory_grid: Any, toys: Any, keys: Any
) -> None:
    """The same run again from a new budget: the server would, the parties' own files would not."""
    folder = keys(4)
    app = secure_app(toys)
    start = toys.record(toys.arrays())
    strategy = private(folder, SharedPrivacy(epsilon=8.0))
    strategy.start(memory_grid(app, 4), start, num_rounds=1)
    with pytest.raises(RunError, match="would spend ε"):
        private(folder, SharedPrivacy(epsilon=8.0)).start(memory_grid(app, 4), start, num_rounds=1)


def test_stopping_and_going_on_carries_the_budget(
    memory_grid: Any, toys: Any, keys: Any, tmp_path: Path
) -> None:
    folder = keys(4)
    kept = StateFolder(tmp_path / "state")
    ledger = tmp_path / "privacy.budget"

    def go(rounds: int, stop: int, privacy: SharedPrivacy | None) -> Any:
        made = strategy_for(
            folder,
            secure={"privacy": privacy},
            **LAYERS,
            round_hook=lambda one: bool(save(made, kept, one)) or one.round == stop,
        )
        found = resume(made, kept)
        first = toys.record(toys.arrays())
        if found is None:
            keep_base(kept, first)
        made.start(
            memory_grid(secure_app(toys), 4),
            found.arrays if found else first,
            num_rounds=rounds,
            start_round=found.round + 1 if found else 1,
            step_state=found.step_state if found else None,
        )
        return made

    first = go(3, 1, SharedPrivacy(ledger=ledger))
    before = ledger.read_bytes()
    second = go(3, 9, SharedPrivacy(ledger=ledger))
    assert second.noised.run.budget.noise == first.noised.run.budget.noise
    assert len(second.noised.run.budget.charges) == 3
    assert 7.9 < second.noised.run.epsilon <= 8.0
    with pytest.raises(PrivacyError, match="go on without"):
        go(4, 9, None)
    ledger.write_bytes(before)
    with pytest.raises(PrivacyError, match="had made 3 releases"):
        go(4, 9, SharedPrivacy(ledger=ledger))


def test_noise_that_cannot_be_had_is_refused_before_anyone_trains(
    memory_grid: Any, toys: Any, keys: Any
) -> None:
    folder = keys(4)
    grid = memory_grid(secure_app(toys), 4)
    strategy = private(folder, SharedPrivacy(noise=1e5))
    with pytest.raises(ConfigError, match="larger ε"):
        strategy.start(grid, toys.record(toys.arrays()), num_rounds=1)
    assert not any(stage_of(reply) == "train" for reply in grid.received)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"fraction_evaluate": 1.0}, "evaluate = false"),
        ({"secure": {"method": "ties"}}, "secure = mean"),
        ({"secure": {"weighting": "examples"}}, "equal"),
    ],
)
def test_what_breaks_the_promise_is_refused(keys: Any, words: dict, said: str) -> None:
    folder = keys(4)
    if "fraction_evaluate" in words:
        made = private(folder, SharedPrivacy())
        from dare_agg.flower.secure.strategy import SecureStrategy

        with pytest.raises(ConfigError, match=said):
            SecureStrategy(secure=made.secure, roster=made.roster, **words)
        return
    with pytest.raises(ConfigError, match=said):
        private(folder, SharedPrivacy(), **words)


def test_tensors_that_noise_ruins_are_refused(memory_grid: Any, toys: Any, keys: Any) -> None:
    folder = keys(4)
    strategy = strategy_for(folder, secure={"privacy": SharedPrivacy()}, dense=[r"^head"])
    with pytest.raises(ConfigError, match="exclude"):
        strategy.start(memory_grid(secure_app(toys), 4), toys.record(toys.arrays()), num_rounds=1)


def test_the_parties_count_as_the_server_does() -> None:
    assert [honest_parties(t, n, 0.2) for t, n in ((3, 4), (4, 5), (7, 10))] == [3, 3, 5]

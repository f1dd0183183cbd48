"""Secure sums over a base on disk: the rounds of whole vectors, resumed too; who lacks it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.clientapp import ClientApp

from dare_agg.checkpoint import write_checkpoint
from dare_agg.downlink.store import VersionStore
from dare_agg.errors import ConfigError
from dare_agg.flower import dare_mod, reception
from dare_agg.flower.resume import keep_base, resume, save
from dare_agg.flower.secure import strategy as secure_strategy
from dare_agg.flower.secure.mod import secure_mod, secure_queries
from dare_agg.flower.secure.records import names_of
from dare_agg.flower.secure.strategy import SecureStrategy
from dare_agg.flower.transport import to_numpy
from dare_agg.rounds.state import StateFolder
from dare_agg.rounds.step import StepState
from dare_agg.secure.roster import read_roster
from dare_agg.secure.settings import SecureSettings
from dare_agg.vectors.model import global_model
from dare_agg.vectors.sources import array_source


@pytest.fixture
def base(toys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DARE_AGG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(reception, "_OFFERS", [])
    write_checkpoint(tmp_path / "base", toys.arrays())
    return tmp_path / "base"


def secure_app(toys: Any, **words: Any) -> ClientApp:
    app = toys.app(mods=[secure_mod, dare_mod], **words)
    secure_queries(app)
    return app


def strategy_on(keys: Path, base: Path, state: Path, **words: Any) -> SecureStrategy:
    settings = {
        "secure": SecureSettings(method="mean", drop_rate="0.5", clip=0.05, min_parties=3),
        "roster": read_roster(keys / "roster.json"),
        "stage_seconds": 20,
        "fraction_evaluate": 0.0,
        "seed": 3,
        "dense": [r"^head"],
        "server_step": "momentum",
        "verify_every": 1,
    }
    return SecureStrategy(**{**settings, "base": base, "state": state, **words})


def nodes(base: Path, lacking: int = -1) -> Any:
    def config(partition: int) -> dict[str, Any]:
        found = {} if partition == lacking else {"base": str(base)}
        return {"partition-id": partition, "num-partitions": 4, **found}

    return config


def test_rounds_are_those_of_whole_vectors_and_a_stopped_run_goes_on(
    memory_grid: Any, toys: Any, keys: Any, base: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    merged, seen, terms = [], [], []
    real, server = secure_strategy.advance_merged, secure_strategy.SecureServer

    def with_terms(agreed: Any, roster: Any) -> Any:
        terms.append(agreed)
        return server(agreed, roster)

    monkeypatch.setattr(secure_strategy, "SecureServer", with_terms)

    def watched(model: Any, state: Any, delta: Any, dense: Any, *words: Any) -> Any:
        merged.append((delta, dense, words[-1]))
        return real(model, state, delta, dense, *words)

    monkeypatch.setattr(secure_strategy, "advance_merged", watched)
    grid = memory_grid(secure_app(toys), 3, node_config=nodes(base))
    folder, state = keys(3), tmp_path / "state"

    def run_until(last: int) -> tuple[SecureStrategy, dict[str, np.ndarray], str]:
        kept = StateFolder(state)

        def after(outcome: Any) -> bool:
            seen.append(outcome)
            save(strategy, kept, outcome)
            return outcome.round == last

        strategy = strategy_on(folder, base, state, round_hook=after)
        resumed = resume(strategy, kept)
        if resumed is None:
            keep_base(kept, strategy)
            result = strategy.start(grid, num_rounds=4)
        else:
            words = {"start_round": resumed.round + 1, "step_state": resumed.step_state}
            result = strategy.start(grid, resumed.arrays, num_rounds=4, **words)
        found = {name: np.array(array) for name, array in to_numpy(result.arrays).items()}
        fingerprint = strategy.fingerprint()
        strategy.downlink.close()
        kept.release()
        return strategy, found, fingerprint

    run_until(2)
    strategy, found, fingerprint = run_until(4)
    assert [one.measurements["accepted"] for one in seen] == [3] * 4
    assert [one.measurements["rejected"] for one in seen] == [[]] * 4
    # Nothing but steps came down, and nothing of a delta went up.
    assert not any(len(message.content.get("arrays", ())) for message in grid.sent)
    for reply in grid.received:
        assert not any(reply.content.metric_records.values())

    store, steps = VersionStore(tmp_path / "again"), StepState()
    arrays = dict(sorted(toys.arrays().items()))
    model = store.start(global_model(arrays, dense=[r"^head"], by_form=True))
    for agreed, (delta, dense, plans) in zip(terms, merged, strict=True):
        # The terms name the version by its values: parties join two sums of the same ones as two
        # of one version, whatever the chain calls them.
        values = {name: np.array(array) for name, array in model.arrays().items()}
        named = global_model(values, dense=[r"^head"], by_form=True).ref
        assert (agreed.base, agreed.layout) == names_of(named)
        whole = delta.mask.scatter(delta.values)
        assert delta.norm() == pytest.approx(float(np.linalg.norm(whole)))
        source = array_source(whole)
        model, steps = real(model, steps, source, dense, strategy.settings, store, plans)
    assert [one.model.ref.version for one in seen][-1] == model.ref.version
    expected = model.arrays()
    assert set(found) == set(expected)
    for name, array in found.items():
        np.testing.assert_array_equal(array, expected[name], name)
    assert fingerprint == model.fingerprints.version


def test_a_party_that_lacks_the_base_stays_away_and_others_go_on(
    memory_grid: Any, toys: Any, keys: Any, base: Path, tmp_path: Path
) -> None:
    grid = memory_grid(secure_app(toys), 4, node_config=nodes(base, lacking=2))
    strategy = strategy_on(keys(4), base, tmp_path / "state", min_available_nodes=3)
    strategy.start(grid, num_rounds=2)
    measured = strategy.outcome.measurements
    assert sorted(measured["clients"]) == ["site 0", "site 1", "site 3"]
    (refused,) = measured["refused"]
    assert refused["detail"].startswith("base-missing: this node lacks the run's base")


def test_values_that_differ_from_the_terms_are_not_trained_on(
    memory_grid: Any, toys: Any, keys: Any, base: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """The terms bind every value, whatever a version is called."""
    trained: list[int] = []
    real = secure_strategy.training_of

    def lying(content: Any, arrays: Any, *words: Any, **more: Any) -> bytes:
        ((key, held),) = arrays.items()
        changed = {name: np.array(array) for name, array in held.items()}
        changed["encoder.bias"] = changed["encoder.bias"] + np.float32(1e-6)
        return real(content, {key: changed}, *words, **more)

    monkeypatch.setattr(secure_strategy, "training_of", lying)
    app = secure_app(toys, edit=lambda partition, tuned, metrics: trained.append(partition))
    grid = memory_grid(app, 3, node_config=nodes(base))
    strategy = strategy_on(keys(3), base, tmp_path / "state")
    with pytest.raises(Exception, match="none of 1 rounds got enough updates"):
        strategy.start(grid, num_rounds=1)
    assert {one["reason"] for one in strategy.outcome.measurements["rejected"]} == {"training"}
    assert not trained


def test_no_base_is_sent_to_parties(keys: Any, base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="send_base has no place in a SecureStrategy"):
        strategy_on(keys(3), base, tmp_path / "state", send_base=True)

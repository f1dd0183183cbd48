"""Secure rounds whose keep rates follow the merged change of the round before."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.clientapp import ClientApp
from toy import roster_of

from dare_agg.checkpoint import write_checkpoint
from dare_agg.codec.fitted_rates import fitted_rates
from dare_agg.downlink.ways import make_downlink
from dare_agg.errors import ConfigError, RunError
from dare_agg.flower import dare_mod, reception
from dare_agg.flower.resume import keep_base, resume, save
from dare_agg.flower.secure import strategy as secure_strategy
from dare_agg.flower.secure.mod import secure_mod, secure_queries
from dare_agg.flower.secure.strategy import SecureStrategy
from dare_agg.privacy.sharing import SharedPrivacy
from dare_agg.rounds.state import StateFolder
from dare_agg.secure.practice import practice_consortium
from dare_agg.secure.roster import read_roster
from dare_agg.secure.settings import SecureSettings


def secure_app(toys: Any) -> ClientApp:
    """The toys, whose bias changes thirty times as much as all else."""

    def edit(partition: int, tuned: dict[str, np.ndarray], metrics: dict[str, Any]) -> None:
        base = toys.arrays()
        tuned["encoder.bias"] += 29 * (tuned["encoder.bias"] - base["encoder.bias"])

    app = toys.app(mods=[secure_mod, dare_mod], edit=edit)
    secure_queries(app)
    return app


@pytest.fixture
def terms(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The terms of all sums, in order."""
    seen: list[Any] = []
    server = secure_strategy.SecureServer

    def noted(agreed: Any, roster: Any) -> Any:
        seen.append(agreed)
        return server(agreed, roster)

    monkeypatch.setattr(secure_strategy, "SecureServer", noted)
    return seen


def strategy_of(roster: Any, method: str = "mean", **words: Any) -> SecureStrategy:
    secure = {"drop_rate": "0.8", "clip": 1.0, "keep_rates": "last", **words.pop("secure", {})}
    settings = {"stage_seconds": 20, "fraction_evaluate": 0.0, "seed": 3, "dense": [r"^head"]}
    return SecureStrategy(
        secure=SecureSettings(method, **secure), roster=roster, **{**settings, **words}
    )


@pytest.mark.parametrize("downlink", ["full", "auto"])
@pytest.mark.parametrize("method", ["mean", "ties", "wudi"])
def test_the_first_round_is_uniform_and_the_next_ones_follow(
    memory_grid: Any,
    toys: Any,
    keys: Any,
    terms: list[Any],
    method: str,
    downlink: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DARE_AGG_CACHE", str(tmp_path / "cache"))
    seen: list[Any] = []
    strategy = strategy_of(
        roster_of(keys(3)), method, downlink=make_downlink(downlink), round_hook=seen.append
    )
    strategy.start(memory_grid(secure_app(toys), 3), toys.record(toys.arrays()), num_rounds=3)
    assert [one.measurements["accepted"] for one in seen] == [3] * 3
    assert [one.measurements["rejected"] for one in seen] == [[]] * 3
    first, *later = terms
    assert first.rates is None
    names = sorted(n for n in toys.arrays() if n in strategy.broadcasting.model.groups.layout)
    bias = names.index("encoder.bias")
    for agreed, outcome in zip(later, seen[1:], strict=True):
        assert agreed.survivors <= first.survivors and agreed.words <= first.words
        counts = agreed.rates.known.counts(np.array(agreed.rates.sizes))
        assert counts[bias] == agreed.rates.sizes[bias]
        kept = agreed.survivors / agreed.size
        assert outcome.measurements["drop_rates"] == [1 - kept] * 3
    # What a party sends is no longer; what it is told, by a byte or nine a tensor.
    sent = [one.measurements["update_bytes"][0] for one in seen]
    assert max(sent[1:]) <= sent[0]
    if downlink == "auto" and method != "wudi":
        assert [step.head.form for step in strategy.downlink.steps] == ["union"] * 3
    assert seen[-1].model.ref.version == strategy.broadcasting.model.ref.version


def test_a_resumed_run_goes_on_with_the_same_rates(
    memory_grid: Any, toys: Any, keys: Any, terms: list[Any], tmp_path: Path
) -> None:
    roster = roster_of(keys(3))
    fresh, kept = toys.record(toys.arrays()), StateFolder(tmp_path / "state")
    keep_base(kept, fresh)
    strategy = strategy_of(roster, round_hook=lambda outcome: save(strategy, kept, outcome))
    strategy.start(memory_grid(secure_app(toys), 3), fresh, num_rounds=1)
    again = strategy_of(roster)
    found = resume(again, kept)
    again.start(
        memory_grid(secure_app(toys), 3), found.arrays, num_rounds=2,
        start_round=2, step_state=found.step_state,
    )  # fmt: skip
    assert [one.rates is None for one in terms] == [True, False]
    assert found.step_state.levels == terms[1].rates.known.levels
    assert again.outcome.measurements["accepted"] == 3


def test_groups_share_the_rates_too(
    memory_grid: Any, toys: Any, terms: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    for key, value in practice_consortium(tmp_path / "keys", 9, groups=3).items():
        monkeypatch.setenv(key, value)
    strategy = strategy_of(
        read_roster(tmp_path / "keys" / "roster.json"),
        secure={"groups": 3}, robust="median", byzantine=1,
    )  # fmt: skip
    strategy.start(memory_grid(secure_app(toys), 9), toys.record(toys.arrays()), num_rounds=2)
    assert strategy.outcome.measurements["accepted"] == 9
    assert len(terms) == 6 and len({one.rates for one in terms[3:]}) == 1 and terms[3].rates


def test_a_base_on_disk_has_rates_too(
    memory_grid: Any,
    toys: Any,
    keys: Any,
    terms: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DARE_AGG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(reception, "_OFFERS", [])
    write_checkpoint(tmp_path / "base", toys.arrays())

    def config(partition: int) -> dict[str, Any]:
        return {"partition-id": partition, "num-partitions": 3, "base": str(tmp_path / "base")}

    grid = memory_grid(secure_app(toys), 3, node_config=config)
    words = {"base": tmp_path / "base", "state": tmp_path / "state", "verify_every": 1}
    strategy = strategy_of(roster_of(keys(3)), **words)
    strategy.start(grid, num_rounds=3)
    assert strategy.outcome.measurements["rejected"] == []
    assert [one.rates is None for one in terms] == [True, False, False]
    strategy.downlink.close()


def test_a_server_whose_rates_are_of_other_tensors_is_refused(
    memory_grid: Any, toys: Any, keys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = SecureSettings.terms

    def other(self: Any, **words: Any) -> Any:
        found = honest(self, **words)
        sizes = (found.size - 1, 1)
        rates = fitted_rates(sizes, b"\x50\x50", found.drop_rate, "f32", told=True)
        return replace(found, rates=rates)

    monkeypatch.setattr(SecureSettings, "terms", other)
    strategy = strategy_of(roster_of(keys(3)))
    with pytest.raises(RunError, match="have other sizes"):
        strategy.start(memory_grid(secure_app(toys), 3), toys.record(toys.arrays()), num_rounds=1)


def test_noise_has_no_rates_of_the_round_before(keys: Any) -> None:
    with pytest.raises(ConfigError, match="noise for the most part"):
        strategy_of(roster_of(keys(3)), secure={"privacy": SharedPrivacy(epsilon=8, delta=1e-5)})

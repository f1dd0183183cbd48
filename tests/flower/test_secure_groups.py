"""Rounds whose sums are of groups, and a robust rule over them: over Flower's messages."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.clientapp import ClientApp

from dare_agg.errors import ConfigError, RunError
from dare_agg.flower import dare_mod
from dare_agg.flower.resume import keep_base, resume, save
from dare_agg.flower.secure.mod import secure_mod, secure_queries
from dare_agg.flower.secure.strategy import SecureStrategy
from dare_agg.flower.transport import to_numpy
from dare_agg.rounds.state import StateFolder
from dare_agg.secure.division import divided
from dare_agg.secure.practice import practice_consortium
from dare_agg.secure.roster import Roster, read_roster
from dare_agg.secure.settings import SecureSettings
from dare_agg.vectors.model import global_model

RULE = "norm-bound+trimmed-mean"


def secure_app(toys: Any, edit: Any = None) -> ClientApp:
    app = toys.app(mods=[secure_mod, dare_mod], edit=edit)
    secure_queries(app)
    return app


@pytest.fixture
def consortium(keys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A consortium for practice of n parties that takes part in sums over groups."""
    from dare_agg.secure import identity as identities

    monkeypatch.setattr(identities, "_SCRYPT_N", 1 << 4)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))

    def make(n: int, groups: int) -> Roster:
        folder = tmp_path / "practice"
        for key, value in practice_consortium(folder, n, groups=groups).items():
            monkeypatch.setenv(key, value)
        return read_roster(folder / "roster.json")

    return make


def strategy_of(roster: Roster, groups: int, f: int = 1, **words: Any) -> SecureStrategy:
    secure = {"drop_rate": "0.5", "clip": 0.5, "groups": groups, **words.pop("secure", {})}
    settings = {
        "robust": RULE, "byzantine": f, "stage_seconds": 20, "fraction_evaluate": 0.0, "seed": 3,
        "dense": [r"^head"],
    }  # fmt: skip
    return SecureStrategy(secure=SecureSettings(**secure), roster=roster, **{**settings, **words})


def partitions(roster: Roster, groups: int) -> list[list[int]]:
    """The partitions of each group: a party's name has its number."""
    return [
        [int(roster[p].name.removeprefix("party ")) for p in group]
        for group in divided(roster, groups)
    ]


def learned(toys: Any, partition: int, number: int = 1) -> np.ndarray:
    before = global_model(toys.arrays(), dense=[r"^head"])
    tuned = {
        n: a + toys.delta(n, a.shape, partition, number) if a.dtype.kind == "f" else a
        for n, a in toys.arrays().items()
    }
    return np.asarray(global_model(tuned, dense=[r"^head"]).delta - before.delta, np.float64)


def step_of(result: Any, toys: Any) -> np.ndarray:
    before = global_model(toys.arrays(), dense=[r"^head"])
    return np.asarray(
        global_model(to_numpy(result.arrays), dense=[r"^head"]).delta - before.delta, np.float64
    )


def test_a_round_is_the_rule_over_the_means_of_groups(
    memory_grid: Any, toys: Any, consortium: Any
) -> None:
    roster = consortium(9, 3)
    seen: list[Any] = []
    strategy = strategy_of(roster, 3, robust="median", round_hook=seen.append)
    grid = memory_grid(secure_app(toys), 9, shuffle=1)
    result = strategy.start(grid, toys.record(toys.arrays()), num_rounds=1)
    step = step_of(result, toys)
    means = [np.mean([learned(toys, p) for p in group], 0) for group in partitions(roster, 3)]
    touched = step != 0
    assert 0.4 < touched.mean() < 0.52
    touched[-1] = False  # a stratum of one element is not rescaled
    assert np.abs(step - 2 * np.median(means, axis=0))[touched].max() < 1e-4
    measured = seen[0].measurements
    assert measured["accepted"] == 9 and measured["secure"]["lost_groups"] == {}
    assert measured["robust"]["rule"] == "median" and measured["robust"]["byzantine"] == 1
    # The dense group goes through the rule too.
    dense = global_model(to_numpy(result.arrays), dense=[r"^head"]).dense[:75]
    before = global_model(toys.arrays(), dense=[r"^head"]).dense[:75]
    heads = [
        np.mean([toys.delta("head.weight", (25, 3), p, 1).ravel() for p in group], 0)
        for group in partitions(roster, 3)
    ]
    assert np.abs(dense - before - np.median(heads, axis=0)).max() < 1e-4


@pytest.mark.parametrize("scale", [-50.0, 50.0])
def test_a_liar_spoils_its_group_and_not_the_round(
    memory_grid: Any, toys: Any, consortium: Any, scale: float
) -> None:
    roster = consortium(12, 4)
    groups = partitions(roster, 4)
    liar = groups[1][0]

    def lie(partition: int, tuned: dict[str, np.ndarray], metrics: dict[str, Any]) -> None:
        if partition == liar:
            for name, array in toys.arrays().items():
                if array.dtype.kind == "f":
                    tuned[name] = array + np.float32(scale) * (tuned[name] - array)

    strategy = strategy_of(roster, 4, robust="norm-bound+nnm+trimmed-mean")
    grid = memory_grid(secure_app(toys, edit=lie), 12)
    step = step_of(strategy.start(grid, toys.record(toys.arrays()), num_rounds=1), toys)
    honest = np.mean([learned(toys, p) for p in range(12) if p != liar], 0)
    spoilt = np.mean([learned(toys, p) * (scale if p == liar else 1) for p in range(12)], 0)
    at = step != 0

    def off(other: np.ndarray) -> float:
        return float(np.linalg.norm(step[at] / 2 - other[at]))

    assert off(honest) < 0.5 * np.linalg.norm(honest[at])
    assert np.linalg.norm((spoilt - honest)[at]) > 3 * np.linalg.norm(honest[at])
    assert strategy.outcome.measurements["robust"]["unheard"] == ["group 1"]


def vanishing(gone: set[int], grid: list[Any]) -> Any:
    """Nodes of the partitions ``gone`` answer with their vectors no more, nor ever again."""

    def vanish(partition: int, reply: Any) -> Any:
        record = None if reply.has_error() else reply.content.config_records.get("dare.secure")
        if partition in gone and record is not None and record.get("stage") == "contribute":
            (one,) = grid
            one.offline.add(next(n for n, p in one.partitions.items() if p == partition))
            return None
        return reply

    return vanish


def test_who_vanishes_takes_their_group_along_and_no_other(
    memory_grid: Any, toys: Any, consortium: Any
) -> None:
    roster = consortium(12, 4)
    grids: list[Any] = []
    gone = vanishing(set(partitions(roster, 4)[3]), grids)
    grids.append(memory_grid(secure_app(toys), 12, tamper=gone))
    seen: list[Any] = []
    strategy = strategy_of(roster, 4, stage_seconds=3, round_hook=seen.append)
    strategy.start(grids[0], toys.record(toys.arrays()), num_rounds=2)
    first, second = (one.measurements for one in seen)
    assert first["accepted"] == second["accepted"] == 9
    assert first["secure"]["lost_groups"] == {3: "threshold"}
    # From then on they are not there at all, and the others go on without them.
    assert second["secure"]["lost_groups"] == {3: "parties"} and not second["rejected"]


def test_too_few_groups_leave_the_model_as_it_is(
    memory_grid: Any, toys: Any, consortium: Any
) -> None:
    roster = consortium(9, 3)
    grids: list[Any] = []
    gone = vanishing({partitions(roster, 3)[0][0]}, grids)
    grids.append(memory_grid(secure_app(toys), 9, tamper=gone))
    strategy = strategy_of(roster, 3, stage_seconds=3)
    with pytest.raises(RunError, match="2 of 3 groups are left"):
        strategy.start(grids[0], toys.record(toys.arrays()), num_rounds=1)


def test_parties_that_did_not_ask_for_groups_refuse(memory_grid: Any, toys: Any, keys: Any) -> None:
    roster = read_roster(keys(9) / "roster.json")
    grid = memory_grid(secure_app(toys), 9)
    strategy = strategy_of(roster, 3)
    with pytest.raises(RunError, match="groups"):
        strategy.start(grid, toys.record(toys.arrays()), num_rounds=1)
    reasons = {r.reason for r in strategy.outcome.rejections}
    assert reasons == {"groups"}


def test_parties_say_in_their_node_config_that_they_take_part(
    memory_grid: Any, toys: Any, keys: Any
) -> None:
    roster = read_roster(keys(9) / "roster.json")

    def node(partition: int, **words: Any) -> dict[str, Any]:
        return {"partition-id": partition, "num-partitions": 9, "secure-groups": 3, **words}

    def reasons(**words: Any) -> set[str]:
        nodes = lambda partition: node(partition, **words)  # noqa: E731
        grid = memory_grid(secure_app(toys), 9, node_config=nodes)
        strategy = strategy_of(roster, 3)
        with contextlib.suppress(RunError):
            strategy.start(grid, toys.record(toys.arrays()), num_rounds=1)
        assert strategy.outcome.measurements["accepted"] == (
            0 if strategy.outcome.rejections else 9
        )
        return {rejection.reason for rejection in strategy.outcome.rejections}

    # Of nine one may collude by default, and of a group of three nobody may.
    assert reasons() == {"parties"}
    assert reasons(**{"secure-colluding": 0.0}) == set()


def test_a_resumed_run_goes_on_with_the_same_groups(
    memory_grid: Any, toys: Any, consortium: Any, tmp_path: Path
) -> None:
    roster = consortium(9, 3)
    fresh, kept = toys.record(toys.arrays()), StateFolder(tmp_path / "state")
    keep_base(kept, fresh)
    strategy = strategy_of(roster, 3, round_hook=lambda outcome: save(strategy, kept, outcome))
    strategy.start(memory_grid(secure_app(toys), 9), fresh, num_rounds=1)
    again = strategy_of(roster, 3)
    found = resume(again, kept)
    assert found is not None and found.round == 1
    result = again.start(
        memory_grid(secure_app(toys), 9), found.arrays, num_rounds=2,
        start_round=2, step_state=found.step_state,
    )  # fmt: skip
    assert again.outcome.round == 2 and again.outcome.measurements["accepted"] == 9
    step = step_of(result, toys)
    assert np.count_nonzero(step) > 0.6 * step.size  # two masks of a half


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"robust": "", "byzantine": 0}, "sums of groups show more"),
        ({"byzantine": 2}, "at least 5 groups, and secure-groups = 3"),
        ({"robust": "momentum+median"}, "leave momentum out"),
        ({"fraction_train": 0.5}, "show single ones"),
        ({"secure": {"groups": 4}}, "set secure-groups = 3 or fewer"),
        ({"secure": {"groups": 1}}, "secure-groups = 3 or more, whose sums it compares"),
        ({"robust": "nmm+median"}, "did you mean 'nnm'"),
    ],
)
def test_what_cannot_be_is_refused(consortium: Any, words: dict[str, Any], said: str) -> None:
    roster = consortium(10, 3)
    strategy_of(roster, 3)
    with pytest.raises(ConfigError, match=said):
        strategy_of(roster, 3, **words)

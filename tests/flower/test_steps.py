"""Steps before the merge in a run of the strategy: rejections, measurements, the version after."""

from __future__ import annotations

import pytest

from dare_agg.downlink.ways import make_downlink
from dare_agg.errors import RunError
from dare_agg.flower import DareStrategy
from dare_agg.rounds.chain import Passed, pooled, reject


def without(*clients: int):
    """A screen that rejects these."""

    def screen(accepted, context):
        out = [reply for reply in accepted if reply.plan.client in clients]
        passed = tuple(reply for reply in accepted if reply.plan.client not in clients)
        why = tuple(rejection for reply in out for rejection in reject(reply, "not today"))
        return Passed(passed, why, ({"round": context.round, "left out": len(out)},))

    return screen


def halves(accepted, context):
    middle = len(accepted) // 2
    parts = [part for part in (accepted[:middle], accepted[middle:]) if part]
    return Passed(tuple(pooled(part, [1 / len(part)] * len(part)) for part in parts))


def run(grid, toys, rounds=2, **words):
    outcomes = []
    strategy = DareStrategy(
        seed=7, fraction_evaluate=0.0, round_hook=lambda o: outcomes.append(o), **words
    )
    strategy.start(grid, toys.record(toys.arrays()), num_rounds=rounds, timeout=30)
    return outcomes


def test_whom_a_step_rejects_is_listed_and_counted_like_anyone(memory_grid, toys):
    outcomes = run(memory_grid(toys.app(), 4), toys, steps=[without(1, 3), halves])
    for number, outcome in enumerate(outcomes, start=1):
        measured = outcome.measurements
        assert [r.client for r in outcome.rejections] == [1, 3]
        assert {r.reason for r in outcome.rejections} == {"outlier"}
        assert [row["detail"] for row in measured["rejected"]] == ["not today"] * 2
        assert measured["accepted"] == len(measured["clients"]) == 2
        assert measured["steps"] == [{"round": number, "left out": 2}]
        assert [plan.client for plan in outcome.plans] == [0, 2]
        assert sum(measured["weights"]) == pytest.approx(1)
        assert outcome.train_metrics


def test_no_step_leaves_no_trace(memory_grid, toys):
    plain, empty = (run(memory_grid(toys.app(), 3), toys, **words) for words in ({}, {"steps": []}))
    assert plain[-1].model.ref == empty[-1].model.ref
    assert "steps" not in plain[-1].measurements


def test_rejections_of_steps_count_against_min_replies(memory_grid, toys):
    with pytest.raises(RunError, match=r"1 of 3 clients .* 2 are needed \(outlier ×2\)"):
        run(memory_grid(toys.app(), 3), toys, steps=[without(0, 1)], min_replies=2)


def test_clients_that_hold_versions_follow_screened_and_pooled_rounds(
    memory_grid, toys, tmp_path, monkeypatch
):
    monkeypatch.setenv("DARE_AGG_CACHE", str(tmp_path))
    downlink, grid = make_downlink("auto"), memory_grid(toys.app(), 4)
    outcomes = run(grid, toys, rounds=4, steps=[without(2), halves], downlink=downlink)
    # The merged change lies on the masks of those who are in it, pooled or not.
    assert [[plan.client for plan in outcome.plans] for outcome in outcomes] == [[0, 1, 3]] * 4
    assert {r.reason for outcome in outcomes for r in outcome.rejections} == {"outlier"}
    down = [max(outcome.measurements["download_bytes"]) for outcome in outcomes]
    assert max(down[1:]) < down[0] / 2

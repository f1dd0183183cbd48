"""A run that is killed and resumed ends with the bits of one that was not."""

import json
import os
import random
import signal
import time

import pytest

from dare_agg.downlink.ways import make_downlink
from dare_agg.errors import StateError
from dare_agg.flower import DareStrategy
from dare_agg.flower.resume import keep_base, resume, save
from dare_agg.rounds.state import StateFolder

ROUNDS = 8


def one_run(grid, toys, folder, *, rounds=ROUNDS, seed=3, downlink="auto", stop_after=None):
    """Start or go on with a run in ``folder``; returns the final version."""
    kept = StateFolder(folder)
    strategy = DareStrategy(
        min_available_nodes=3,
        min_train_nodes=2,
        fraction_train=0.7,
        fraction_evaluate=0.0,
        seed=seed,
        drop_rate="0.9",
        dense=["^head"],
        server_step="momentum",
        downlink=make_downlink(downlink),
        round_hook=lambda o: bool(save(strategy, kept, o)) or o.round == stop_after,
    )
    resumed = resume(strategy, kept)
    if resumed is None:
        initial, start, state = toys.record(toys.arrays()), 1, None
        keep_base(kept, initial)
    else:
        initial, start, state = resumed.arrays, resumed.round + 1, resumed.step_state
        if resumed.round >= rounds:
            return resumed.version
    strategy.start(grid, initial, num_rounds=rounds, start_round=start, step_state=state)
    return strategy.outcome.model.ref.version


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DARE_AGG_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("downlink", ["auto", "full"])
def test_stopping_and_going_on_changes_nothing(memory_grid, toys, cache, tmp_path, downlink):
    whole = one_run(memory_grid(toys.app(), 3), toys, tmp_path / "a", rounds=5, downlink=downlink)
    for stop in (1, 3, 4, None):
        last = one_run(
            memory_grid(toys.app(), 3, shuffle=7),
            toys,
            tmp_path / "b",
            rounds=5,
            downlink=downlink,
            stop_after=stop,
        )
    assert last == whole


def test_a_secret_that_was_drawn_is_kept(memory_grid, toys, cache, tmp_path):
    one_run(memory_grid(toys.app(), 3), toys, tmp_path / "a", seed=None, stop_after=1)
    facts = StateFolder(tmp_path / "a").load()[0].facts
    one_run(memory_grid(toys.app(), 3), toys, tmp_path / "a", seed=None, stop_after=2)
    assert StateFolder(tmp_path / "a").load()[0].facts["secret"] == facts["secret"]


def test_a_corrupt_newest_state_costs_one_round(memory_grid, toys, cache, tmp_path):
    whole = one_run(memory_grid(toys.app(), 3), toys, tmp_path / "a", rounds=4)
    one_run(memory_grid(toys.app(), 3), toys, tmp_path / "b", rounds=4, stop_after=3)
    newest = tmp_path / "b" / "round-00000003.state"
    newest.write_bytes(newest.read_bytes()[:-1])
    assert one_run(memory_grid(toys.app(), 3), toys, tmp_path / "b", rounds=4) == whole


def test_other_settings_are_refused(memory_grid, toys, cache, tmp_path):
    one_run(memory_grid(toys.app(), 3), toys, tmp_path / "a", rounds=1)
    with pytest.raises(StateError, match="settings the run was started with"):
        one_run(memory_grid(toys.app(), 3), toys, tmp_path / "a", downlink="full")


@pytest.mark.slow
def test_kill_9_at_50_random_moments(memory_grid, toys, cache, tmp_path):
    """Each attempt is a process of its own, killed without warning, then resumed."""
    whole = one_run(memory_grid(toys.app(), 3), toys, tmp_path / "calm")
    rng = random.Random(11)
    kills, finished, lived = 0, [], 0.3
    attempt = 0
    while kills < 50:
        folder = tmp_path / f"run{len(finished)}"
        result = tmp_path / f"result{attempt}"
        attempt += 1
        pid = os.fork()
        if pid == 0:
            try:
                version = one_run(memory_grid(toys.app(), 3), toys, folder)
                result.with_suffix(".part").write_text(json.dumps(version))
                result.with_suffix(".part").rename(result)
            finally:
                os._exit(0)
        began = time.monotonic()
        until = began + rng.uniform(0.0, lived)
        while time.monotonic() < until and not result.exists():
            time.sleep(0.002)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        if result.exists():
            finished.append(json.loads(result.read_text()))
        else:
            kills += 1
            # Attempts that end before any round would never get on: live a little longer.
            lived = min(lived * 1.05, 3.0)
    while len(finished) < 1:
        finished.append(one_run(memory_grid(toys.app(), 3), toys, tmp_path / "run0"))
    unfinished = tmp_path / f"run{len(finished)}"
    if unfinished.exists():
        finished.append(one_run(memory_grid(toys.app(), 3), toys, unfinished))
    assert set(finished) == {whole}

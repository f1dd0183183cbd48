"""Federated runs that the first layout cut off end where it would have ended them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from exact_app import CUT_OFF, ROUNDS, SAMPLING, STRATEGIES, exact_app, record, start_arrays

from dare_agg.downlink.ways import make_downlink
from dare_agg.files.state_file import read_state
from dare_agg.flower import DareStrategy, dare_mod
from dare_agg.flower.resume import resume
from dare_agg.flower.transport import to_numpy
from dare_agg.rounds.state import StateFolder
from simulations.runs.memory_grid import MemoryGrid

DATA = Path(__file__).resolve().parents[1] / "data" / "made-by-0.1"
EXPECTED = json.loads((DATA / "states" / "expected.json").read_text())


@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("name", EXPECTED)
def test_a_run_goes_on_to_the_same_version(
    name: str, lost: int, old: Callable[[str], Path]
) -> None:
    """Also without its newest state, from the round before."""
    folder = old(f"states/{name}")
    for number in range(CUT_OFF, CUT_OFF - lost, -1):
        (folder / f"round-{number:08d}.state").unlink()
    words = dict(STRATEGIES[name])
    downlink = make_downlink(words.pop("downlink"))
    strategy = DareStrategy(**SAMPLING, **words, downlink=downlink)
    kept = StateFolder(folder)
    resumed = resume(strategy, kept)
    assert resumed is not None and resumed.round == CUT_OFF - lost
    assert resumed.step_state.count == resumed.round
    if not lost:
        assert resumed.version == EXPECTED[name]["version"]
    assert strategy.secret.hex() == resumed.facts["secret"]
    strategy.start(
        MemoryGrid(exact_app([dare_mod]), 3),
        resumed.arrays,
        num_rounds=ROUNDS,
        start_round=resumed.round + 1,
        step_state=resumed.step_state,
    )
    assert strategy.outcome is not None
    assert strategy.outcome.model.ref.version == EXPECTED[name]["undisturbed"]


@pytest.mark.parametrize("name", EXPECTED)
def test_the_base_is_read_in_its_order(name: str, old: Callable[[str], Path]) -> None:
    base = StateFolder(old(f"states/{name}")).load_base()
    start = to_numpy(record(start_arrays()))
    assert list(base) == list(start)
    for array, wanted in zip(base.values(), start.values(), strict=True):
        assert array.dtype == wanted.dtype and array.tobytes() == wanted.tobytes()


def test_every_state_file_is_whole() -> None:
    files = [path for path in sorted(DATA.rglob("*.state")) if "vault" not in path.parts]
    assert len(files) > 30
    for path in files:
        assert read_state(path)[0], path

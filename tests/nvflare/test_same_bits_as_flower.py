"""The same clients under Flower and in an NVFlare job make the same bits."""

import sys
from pathlib import Path

import numpy as np
import pytest
from made_sites import made, turn_of

pytest.importorskip("flwr", reason="needs the extra flower: pip install 'dare-agg[flower]'")
sys.path.insert(0, str(Path(__file__).parents[1] / "flower"))
from toy import numpy_of, record_of, toy_app, toy_arrays, toy_delta

from dare_agg.downlink.ways import make_downlink
from dare_agg.flower import DareStrategy
from simulations.runs.memory_grid import MemoryGrid, pretend_task

WORDS = [
    {},
    {"drop_rate": 0.9, "dense": ["^head"]},
    {"drop_rate": 0.5, "values": "i8", "exclude": ["^head"], "server_step": "adam(tau=1e-3)"},
    {"drop_rate": 0.9, "keep_rates": "last", "mask": "stratified"},
    {"drop_rate": 0.8, "values": "b4", "method": "ties", "weighting": "equal"},
    {"method": "task-arithmetic", "robust": "trimmed-mean", "byzantine": 1, "drop_rate": 0.9},
]


def trained(arrays, number, server_round):
    """What `toy_app` makes of arrays."""
    return {
        name: np.asarray(
            array + toy_delta(name, array.shape, number, server_round)
            if array.dtype.kind == "f"
            else array + 1
        )
        for name, array in arrays.items()
    }


@pytest.mark.parametrize("downlink", ["auto", "full"])
@pytest.mark.parametrize("words", WORDS)
def test_a_job_makes_the_bits_of_a_flower_app(words, downlink, tmp_path, monkeypatch):
    pretend_task()
    monkeypatch.setenv("DARE_AGG_CACHE", str(tmp_path / "flower"))
    outcomes = []
    strategy = DareStrategy(
        seed=7, fraction_evaluate=0.0, min_evaluate_nodes=0, min_available_nodes=3,
        downlink=make_downlink(downlink), round_hook=outcomes.append, **words,
    )  # fmt: skip
    grid = MemoryGrid(toy_app(), 3)
    result = strategy.start(grid, record_of(toy_arrays()), num_rounds=3, timeout=30)

    run, local = made(3, downlink=downlink, **words), {}
    run.begin(toy_arrays())
    for number in range(1, 4):
        for site in run.open(number, ["2", "0", "1"]).plans:
            turn = turn_of(run, site, tmp_path / "job")
            own = local.setdefault(site, {})
            returned = trained(turn.arrays(own), int(site), number)
            payloads, reply, kept = turn.answer(returned, differences=False)
            own.update(kept)
            assert run.take(site, reply, payloads, 10 * (int(site) + 1), {})
        finished = run.close()
        flower = outcomes[number - 1].measurements
        for word in ("update_bytes", "dense_bytes", "examples", "delta_norms", "weights"):
            assert finished.measurements[word] == flower[word], word
        if downlink == "auto" and number > 1:
            step = strategy.downlink.steps[number - 2].nbytes
            assert finished.measurements["download_bytes"] == [step] * 3
    for name, array in numpy_of(result.arrays).items():
        assert array.tobytes() == finished.arrays[name].tobytes(), name
    assert run.model.ref.version == strategy.broadcasting.model.ref.version

"""A base on disk in Flower's own simulation, whose clients find it by their app's word."""

import numpy as np
import pytest

from dare_agg.checkpoint import open_checkpoint
from dare_agg.checkpoint.model import model_in
from dare_agg.flower.processes.launch import run_app, simulation_superlink, write_connection
from simulations.bench.federation import APP, calm_report, read_report
from tests.tiny import llama


@pytest.mark.slow
def test_flowers_simulation_ends_at_the_same_fingerprint(tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("DARE_AGG_CACHE", str(tmp_path / "cache"))
    base = llama(tmp_path / "base")
    run = {"num-rounds": 3, "base": str(base), "public-base": True, "min-clients": 2}
    home = tmp_path / "home"
    with simulation_superlink(home) as simulation:
        write_connection(home, "sim", {"address": simulation.address, "insecure": True})
        status = run_app(
            APP,
            home,
            "sim",
            {**run, "output": str(tmp_path / "out")},
            federation_config={"num-supernodes": 2, "client-resources-num-cpus": 1},
            simulation=simulation,
        )
    assert status.ok, status
    report = read_report(tmp_path / "out")
    assert [row["accepted"] for row in report["rounds"]] == [2, 2, 2]
    assert report["rounds"][-1]["refused"] == []
    saved = model_in(open_checkpoint(tmp_path / "out" / "model"))
    assert saved.fingerprints.version == report["fingerprint"]
    moved = saved.arrays()["model.norm.weight"] - 1
    assert 1e-4 < np.abs(moved).max() < 0.1
    calm = calm_report(["0", "1"], tmp_path / "calm", **run)
    assert report["fingerprint"] == calm["fingerprint"]

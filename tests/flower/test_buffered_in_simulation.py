"""A buffer in Flower's own simulation, and its record followed in this process."""

from __future__ import annotations

from pathlib import Path

import pytest

from dare_agg.flower.processes.launch import run_app, simulation_superlink, write_connection
from dare_agg.rounds.arrivals import read_events
from simulations.bench.federation import APP, calm_report, read_report

RUN = {"num-rounds": 5, "buffer": 2, "size": 20_000, "min-clients": 4}


@pytest.mark.slow
def test_merges_in_flowers_simulation_are_made_again_from_their_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("DARE_AGG_CACHE", str(tmp_path / "cache"))
    home, out = tmp_path / "home", tmp_path / "out"
    with simulation_superlink(home) as simulation:
        write_connection(home, "sim", {"address": simulation.address, "insecure": True})
        status = run_app(
            APP,
            home,
            "sim",
            {**RUN, "output": str(out)},
            federation_config={"num-supernodes": 4, "client-resources-num-cpus": 1},
            simulation=simulation,
        )
    assert status.ok, status
    report = read_report(out)
    assert [row["accepted"] for row in report["rounds"]] == [2] * 5
    assert not any(row["rejected"] for row in report["rounds"])
    record = out / "buffer" / "arrivals.jsonl"
    assert sum(event.kind == "merge" for event in read_events(record)) == 5
    monkeypatch.setenv("DARE_AGG_CACHE", str(tmp_path / "other"))
    again = calm_report(list("0123"), tmp_path / "calm", **RUN, arrivals=str(record))
    assert again["version"] == report["version"]

"""A base on disk over a real SuperLink and SuperNodes, killed in the middle."""

import numpy as np
import pytest

from dare_agg.checkpoint import open_checkpoint
from dare_agg.checkpoint.model import model_in
from simulations.bench.federation import calm_report, finished_rounds, read_report
from tests.tiny import llama

SITES = ["north", "south"]


@pytest.mark.slow
def test_a_killed_run_ends_at_the_undisturbed_fingerprint(federation, tmp_path, monkeypatch):
    """Another base is refused with the reason; what is saved is the clients' version."""
    monkeypatch.setenv("DARE_AGG_CACHE", str(tmp_path / "fingerprints"))
    base, other = llama(tmp_path / "base"), llama(tmp_path / "other", seed=1)
    run = {"num_rounds": 3, "pause": 2.0, "base": str(base), "min_clients": 2}
    fed = federation(names=[*SITES, "other"])
    fed.start_superlink()
    for name in fed.names:
        fed.register(name)
        fed.node_config = {"base": str(other if name == "other" else base)}
        fed.start_node(name)
    fed.submit(tmp_path / "out", **run)
    fed.wait_for(lambda: finished_rounds(tmp_path / "out") >= 1, 300)
    assert fed.kill_9_server_apps()
    fed.wait_for(lambda: not fed.any_run_under_way(), 180)
    assert read_report(tmp_path / "out") is None
    fed.submit(tmp_path / "out", **run)
    fed.wait_for(lambda: read_report(tmp_path / "out") is not None, 300)
    fed.stop_all()
    report = read_report(tmp_path / "out")
    assert report["resumed_after"] >= 1
    assert all(row["accepted"] == 2 for row in report["rounds"])
    (refused,) = report["rounds"][-1]["refused"]
    assert refused.startswith("base-missing: ") and "base=FOLDER in --node-config" in refused
    calm = calm_report(SITES, tmp_path / "calm", node_config={"base": str(base)}, **run)
    assert report["version"] == calm["version"]
    assert report["fingerprint"] == calm["fingerprint"]
    saved = open_checkpoint(tmp_path / "out" / "model")
    model = model_in(saved, dense=[r"^head\."])
    assert model.fingerprints.version == report["fingerprint"]
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model").state_dict()
    for name, array in model.arrays().items():
        assert np.array_equal(loaded[name].numpy(), array)

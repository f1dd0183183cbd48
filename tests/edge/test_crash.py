"""kill -9 of SuperLink and of everything in a real federation: the same bits come out."""

import pytest


@pytest.mark.slow
def test_superlink_and_then_everything_is_killed(federation, tmp_path):
    fed = federation(names=["a", "b"], isolation="process")
    fed.start_superlink()
    fed.start_superexec()
    for name in fed.names:
        fed.register(name)
        fed.start_node(name)
    out = tmp_path / "killed"
    fed.submit(out, num_rounds=5, pause=2.0)
    fed.wait_for(lambda: (out / "state" / "round-00000001.state").exists(), 240)
    fed.kill_9("superlink")
    fed.start_superlink()
    # The run survives its SuperLink: ServerApp and SuperLink are processes of their own.
    fed.wait_for(lambda: len(list((out / "state").glob("round-*"))) == 2, 240)
    for name in list(fed.processes):
        fed.kill_9(name)
    done_before = max(int(p.name[6:14]) for p in (out / "state").glob("round-*"))
    (fed.folder / "state.db").unlink()
    fed.start_superlink()
    fed.start_superexec()
    for name in fed.names:
        fed.register(name)
        fed.start_node(name)
    fed.submit(out, num_rounds=5)
    fed.wait_for(lambda: (out / "report.json").exists(), 300)
    killed = fed.report(out)
    assert killed["resumed_after"] >= done_before >= 2
    calm = tmp_path / "calm"
    fed.submit(calm, num_rounds=5)
    fed.wait_for(lambda: (calm / "report.json").exists(), 300)
    assert fed.report(calm)["version"] == killed["version"]

"""kill -9 of SuperLink, SuperNode and everything in a real federation: the same bits come out."""

import pytest

from simulations.federation import calm_report, finished_rounds, read_report


@pytest.mark.slow
def test_superlink_and_then_everything_is_killed(federation, tmp_path):
    fed = federation(names=["a", "b"], isolation="process")
    fed.start_all()
    out = tmp_path / "killed"
    fed.submit(out, num_rounds=4, pause=1.0)
    fed.wait_for(lambda: finished_rounds(out) >= 1, 120)
    fed.kill_9("superlink")
    fed.start_superlink()
    # The run survives its SuperLink: ServerApp and SuperLink are processes of their own.
    fed.wait_for(lambda: finished_rounds(out) >= 2, 120)
    assert list(fed.runs().values()) == ["running"]
    fed.kill_9_everything()
    done = finished_rounds(out)
    (fed.folder / "state.db").unlink()
    fed.start_all()
    fed.submit(out, num_rounds=4)
    fed.wait_for(lambda: read_report(out) is not None, 180)
    killed = read_report(out)
    assert killed["resumed_after"] == done >= 2
    calm = calm_report(fed.names, tmp_path / "calm", num_rounds=4)
    assert killed["version"] == calm["version"]
    assert calm["resumed_after"] == 0

"""A real deployment on loopback: TLS, registered nodes, signed updates, both links small."""

import pytest

from simulations.federation import read_report


@pytest.mark.slow
def test_tls_registered_nodes_and_signed_updates(federation, tmp_path):
    fed = federation(names=["north", "south"])
    fed.start_all()
    status = fed.run(tmp_path / "out", num_rounds=3)
    assert status.ok, status
    report = read_report(tmp_path / "out")
    assert [row["accepted"] for row in report["rounds"]] == [2, 2, 2]
    down = [max(row["download_bytes"]) for row in report["rounds"]]
    # 100,000 parameters: the base once, then 1 bit for a fifth of them.
    assert down[0] > 400_000 and max(down[1:]) < 6000
    assert max(max(row["upload_bytes"]) for row in report["rounds"]) < 4000

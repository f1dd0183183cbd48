"""A real SuperNode behind 300 kbit/s up, 1 Mbit/s down, 100 ms there and back, 1 % loss."""

import pytest

from simulations.bench.federation import calm_report, read_report
from simulations.bench.slow_link import SlowLink, why_not


@pytest.mark.slow
@pytest.mark.parametrize("size", [50_000, pytest.param(300_000, marks=pytest.mark.federation)])
def test_rounds_complete_over_a_slow_lossy_link(federation, tmp_path, size):
    if reason := why_not():
        pytest.skip(reason)
    with SlowLink(1) as link:
        fed = federation(
            names=["far"],
            host=link.gateway,
            prefix=lambda name: link.prefix,
            node_config={"uplink-kbit-s": 300},
        )
        fed.start_all()
        settings = {"num_rounds": 2, "size": size, "upload_seconds": 0.05}
        status = fed.run(tmp_path / "out", **settings)
        fed.stop_all()
    assert status.ok, status
    report = read_report(tmp_path / "out")
    assert [row["accepted"] for row in report["rounds"]] == [1, 1]
    # The base went down once, whole, over this very line; updates went up in a few packets.
    assert link.carried["down"] > 4 * size and link.lost > 0
    # Its uplink gives this node a drop rate of its own: 0.05 s at 300 kbit/s are 1875 bytes.
    assert max(max(row["upload_bytes"]) for row in report["rounds"]) < 1875 + 500
    rates = [rate for row in report["rounds"] for rate in row["drop_rates"]]
    assert all(rate > 1 - 8 * 1875 / size for rate in rates)
    # Of 1 Mbit/s a parameter takes 32 µs; the second round sends no base.
    first, second = report["rounds"]
    assert first["seconds"] > 30e-6 * size and second["download_bytes"][0] < 6000
    calm = calm_report(["far"], tmp_path / "calm", node_config={"uplink-kbit-s": 300}, **settings)
    assert report["version"] == calm["version"]

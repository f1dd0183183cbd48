"""A registered node of a real federation pushes a part of twelve bytes that Flower cannot read."""

import os

import pytest

from simulations.bench.federation import read_report

SITES = ("east", "north", "south")
# In every process of the node's, whatever app it is sent: its receipt of an update is garbage.
GARBAGE = """
from flwr.app import ConfigRecord

honest = ConfigRecord.deflate

def deflate(self):
    return b"ConfigRecord  12\\0" + b"\\xff" * 12 if "round" in self else honest(self)

ConfigRecord.deflate = deflate
"""


@pytest.mark.slow
@pytest.mark.federation
def test_garbage_over_tls_is_one_nodes_rejection(federation, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    (own / "sitecustomize.py").write_text(GARBAGE)

    path = f"PYTHONPATH={own}:{os.environ.get('PYTHONPATH', '')}"

    def prefix(name):
        return ["env", path] if name == "north" else []

    made = federation(names=SITES, prefix=prefix)
    made.start_all()
    output = tmp_path / "out"
    status = made.run(output, num_rounds=2, size=50_000, deadline=600)
    log = (made.folder / "run.log").read_text()
    assert status.ok, log[-3000:]
    report = read_report(output)
    assert [row["accepted"] for row in report["rounds"]] == [2, 2]
    assert [row["rejected"] for row in report["rounds"]] == [["transport"], ["transport"]]
    assert "DecodeError" in log

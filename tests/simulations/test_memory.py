"""Own pages and mapped files are told apart, of a process and of a command."""

import sys
import time

from simulations.runs.memory import PeakRoom, run_watched

_TAKE = """
import sys, time
import numpy as np
own = np.ones(48 << 20, np.uint8)
mapped = np.memmap(sys.argv[1], np.uint8, "r")
print(int(mapped.sum()))
time.sleep(0.2)
"""


def test_a_command_is_watched_and_mapped_pages_are_not_its_own(tmp_path):
    nothing = run_watched([sys.executable, "-c", "import numpy, time; time.sleep(0.2)"])
    (tmp_path / "file").write_bytes(bytes(64 << 20))
    took = run_watched([sys.executable, "-c", _TAKE, tmp_path / "file"])
    assert took.status == 0 and took.out == "0\n", took.err
    assert 48 <= took.own_mib - nothing.own_mib < 60
    assert 64 <= took.mapped_mib - nothing.mapped_mib < 80
    assert took.cpu_seconds > 0 and took.seconds > 0.2


def test_a_command_that_fails_says_what_it_said(tmp_path):
    ran = run_watched([sys.executable, "-c", "raise SystemExit('no')"], folder=tmp_path)
    assert (ran.status, ran.err) == (1, "no\n")


def test_room_on_the_disk_is_what_was_taken_at_most(tmp_path):
    (tmp_path / "within").mkdir()
    with (tmp_path / "within" / "holes").open("wb") as file:
        file.truncate(1 << 30)
    with PeakRoom(tmp_path, 0.01) as room:
        (tmp_path / "file").write_bytes(bytes(8 << 20))
        time.sleep(0.3)
        (tmp_path / "file").unlink()
        time.sleep(0.1)
        room.look()
    assert 8 << 20 <= room.most < 9 << 20

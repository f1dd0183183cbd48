"""Fingerprints of unchanged files are remembered; any change makes them strangers."""

import os

import numpy as np

from dare_agg.checkpoint import open_checkpoint, write_checkpoint
from dare_agg.checkpoint.fingerprints import recall


def test_a_changed_file_is_hashed_again(tmp_path, monkeypatch):
    monkeypatch.setenv("DARE_AGG_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "m.safetensors"
    write_checkpoint(path, {"w": np.arange(6, dtype=np.float32)})
    first = open_checkpoint(path)
    layout = first.layout().fingerprint
    found = first.fingerprint()
    assert recall([path], layout) is None  # too fresh to be sure
    monkeypatch.setattr("dare_agg.checkpoint.fingerprints._SETTLED_SECONDS", 0.0)
    assert open_checkpoint(path).fingerprint() == found == recall([path], layout)
    times = path.stat().st_mtime_ns
    with path.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\x41")
    os.utime(path, ns=(times, times))  # the time of change of the inode still tells
    assert recall([path], layout) is None
    assert open_checkpoint(path).fingerprint() != found

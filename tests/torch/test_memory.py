"""Beside a model and its training a turn takes a few MiB, whatever the model's size."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("torch")

SCRIPT = """
import sys, threading, time
import numpy as np, torch
from dare_agg.codec.mask import parse_drop_rate
from dare_agg.codec.update import UpdateSpec, encode_update
from dare_agg.torch.delta import TrainedDelta
from dare_agg.torch.loading import as_source, load_into
from dare_agg.torch.places import held
from dare_agg.vectors.layout import layout_of
from dare_agg.vectors.model import GlobalModel, Groups, ModelRef
from dare_agg.vectors.tiled import TiledVector

torch.set_num_threads(1)
shapes = {f"w{number}": (1000, 1000) for number in range(int(sys.argv[1]))}
dtype = getattr(torch, sys.argv[2])
layout = layout_of(shapes)

class Lies:
    size = layout.size
    def read(self, lo, hi, out):
        out[:] = 0.5
    def take(self, positions):
        return np.full(positions.size, 0.5, np.float32)

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("RssAnon"))

def watch():
    while True:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.002)

dtypes = dict.fromkeys(shapes, np.dtype(np.float32))
groups = Groups(layout, layout_of({}), (), tuple(shapes), dtypes)
named = ModelRef("00" * 32, layout.fingerprint, layout.size)
version = GlobalModel(groups, TiledVector(Lies()), np.empty(0, np.float32), {}, named)
parts = {name: held(torch.ones(shape, dtype=dtype)) for name, shape in shapes.items()}

def turn(rate):
    start = load_into(version, parts)
    for part in parts.values():
        part.local.add_(0.01)
    delta = TrainedDelta(layout, parts, as_source(start.delta))
    delta.measure()
    size, key = layout.size, bytes(16)
    drop = parse_drop_rate(rate)
    spec = UpdateSpec(size, drop, "stratified", key, key, 0, "b1", "00" * 32, layout.fingerprint)
    return encode_update(spec, delta)

begun, peak = anonymous(), [0.0]
threading.Thread(target=watch, daemon=True).start()
turn("0.99"), turn("0.9")
print(peak[0] - begun)
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("millions", [10, 80])
def test_a_turn_takes_the_same_memory_for_any_model(millions, dtype):
    command = [sys.executable, "-c", SCRIPT, str(millions), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    # Compiled loops and torch's own workspace are in it.
    assert float(done.stdout) < 100

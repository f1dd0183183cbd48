"""The server's own memory over a store on disk: bytes, not time."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent

# Rounds of a model that lies on disk; prints the peak of anonymous memory in MiB of each.
PROGRAM = """
import sys, threading
import numpy as np
from dare_agg.codec.mask import parse_drop_rate
from dare_agg.codec.update import decode_update, encode_update
from dare_agg.downlink.store import VersionStore
from dare_agg.rounds.plan import make_plans
from dare_agg.rounds.server import Accepted
from dare_agg.rounds.settings import FederatedSettings
from dare_agg.rounds.step import StepState, server_step
from dare_agg.rounds.streamed import advance_streamed
from dare_agg.rounds.terms import UpdateTerms
from dare_agg.vectors.layout import layout_of
from dare_agg.vectors.model import GlobalModel, Groups
from dare_agg.vectors.sources import array_source
from dare_agg.vectors.tiled import TiledVector

folder, size, clients, rounds, step = sys.argv[1], *map(int, sys.argv[2:5]), sys.argv[5]
np.lib.format.open_memmap(folder + "/base.npy", "w+", np.float32, (size,)).flush()
base = np.load(folder + "/base.npy", mmap_mode="r")
layout = layout_of({f"l{i}": (size // 10,) for i in range(10)})
dtypes = {name: np.dtype(np.float32) for name in layout.names}
groups = Groups(layout, layout_of({}), (), layout.names, dtypes)
delta = TiledVector(array_source(base))
model = GlobalModel(groups, delta, np.empty(0, np.float32), {})
terms = UpdateTerms(parse_drop_rate("0.99"))
settings = FederatedSettings(terms, server_step=server_step(step))
store, state = VersionStore(folder + "/store"), StepState()
model = store.start(model)
peak, ended = 0, threading.Event()

def watch():
    global peak
    while not ended.wait(0.002):
        with open("/proc/self/status") as status:
            found = next(line for line in status if line.startswith("RssAnon"))
        peak = max(peak, int(found.split()[1]) // 1024)

class Trained:
    size = layout.size
    def take(self, positions):
        return np.sin(positions).astype(np.float32) * np.float32(1e-4)
    def read(self, lo, hi, out):
        out[:] = self.take(np.arange(lo, hi))

watcher = threading.Thread(target=watch)
watcher.start()
try:
    for number in range(1, rounds + 1):
        plans = make_plans(b"s" * 32, number, [None] * clients, terms, model.ref)
        accepted = []
        for plan in plans:
            blob = encode_update(plan.spec(), Trained())
            accepted.append(Accepted(plan, decode_update(blob, plan.spec()), None, 1.0))
        model, state, _ = advance_streamed(model, state, accepted, settings, store, plans)
        store.broadcast(model, "")
        print(peak, flush=True)
        peak = 0
finally:
    ended.set()
    watcher.join()
"""


def peaks(folder: Path, size: int, clients: int, rounds: int, step: str = "plain") -> list[int]:
    words = [str(folder), str(size), str(clients), str(rounds), step]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    return [int(word) for word in done.stdout.split()]


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_server_of_22_million_parameters_and_64_clients_takes_less_than_200_mib(
    tmp_path: Path,
) -> None:
    assert max(peaks(tmp_path, 22_000_000, 64, 2)) <= 200


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("step", ["plain", "adam"])
def test_memory_does_not_grow_with_the_model_or_the_rounds(tmp_path: Path, step: str) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    small.mkdir(), large.mkdir()
    few = peaks(small, 2_000_000, 4, 12, step)
    assert max(few[6:]) <= max(few[:6]) + 8
    assert max(peaks(large, 12_000_000, 4, 2, step)) <= max(few) + 48

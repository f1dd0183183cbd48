"""What the server's store takes on the disk beside the base: at most four bytes a parameter."""

import threading
from pathlib import Path

import numpy as np

from dare_agg.codec.mask import parse_drop_rate
from dare_agg.codec.update import decode_update, encode_update
from dare_agg.downlink.store import VersionStore
from dare_agg.rounds.plan import make_plans
from dare_agg.rounds.server import Accepted
from dare_agg.rounds.settings import FederatedSettings
from dare_agg.rounds.step import StepState
from dare_agg.rounds.streamed import advance_streamed
from dare_agg.rounds.terms import UpdateTerms
from dare_agg.vectors.model import global_model
from dare_agg.vectors.sources import array_source

SIZE, CLIENTS, ROUNDS = 8_000_000, 6, 2


def taken(folder: Path) -> int:
    found = 0
    for path in folder.rglob("*"):
        try:
            found += 512 * path.stat().st_blocks
        except FileNotFoundError:  # replaced meanwhile
            continue
    return found


def test_it_takes_four_bytes_a_parameter_where_nearly_all_counts_leave_16_bits(
    tmp_path: Path,
) -> None:
    rng = np.random.default_rng(0)
    base = (rng.standard_normal(SIZE, np.float32) * np.float32(0.02)).reshape(-1, 1000)
    store, state = VersionStore(tmp_path), StepState()
    model = store.start(global_model({"weight": base}))
    terms = UpdateTerms(parse_drop_rate("0.99"))
    most, ended = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not ended.wait(0.005):
            most = max(most, taken(tmp_path))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for number in range(1, ROUNDS + 1):
            plans = make_plans(b"s" * 32, number, [None] * CLIENTS, terms, model.ref)
            accepted = []
            for plan in plans:
                delta = rng.standard_normal(SIZE, np.float32) * np.float32(2e-4)
                blob = encode_update(plan.spec(), array_source(delta))
                accepted.append(Accepted(plan, decode_update(blob, plan.spec()), None, 1.0))
            model, state, _ = advance_streamed(
                model, state, accepted, FederatedSettings(terms), store, plans
            )
            most = max(most, taken(tmp_path))
    finally:
        ended.set()
        watcher.join()
    counts = np.abs(store._files().counts[:].astype(np.int64))
    assert np.mean(counts[counts > 0] >= 1 << 15) > 0.95
    # Spread so that blocks of counts without any are rare.
    assert min(np.count_nonzero(tile) for tile in np.split(counts, 800)) > 500
    assert most <= 4 * SIZE, most / SIZE

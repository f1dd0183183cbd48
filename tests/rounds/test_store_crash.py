"""A run over a store on disk that is killed at any moment, or finds the disk full, goes on.

Real processes, ended by SIGKILL: before and after everything that they ask of the disk, and at
moments of the clock. Resumed, a run ends with the bits of one that nothing happened to.
"""

import errno
import os
import random
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from dare_agg.codec.mask import parse_drop_rate
from dare_agg.downlink.disk import state as disk_state
from dare_agg.downlink.disk import undo
from dare_agg.downlink.disk.counts_file import CountsFile
from dare_agg.downlink.disk.mapped import MappedVector
from dare_agg.downlink.store import VersionStore
from dare_agg.errors import StateError
from dare_agg.rounds.plan import make_plans
from dare_agg.rounds.settings import FederatedSettings
from dare_agg.rounds.state import StateFolder, pack_round, unpack_model, unpack_step
from dare_agg.rounds.step import StepState, server_step
from dare_agg.rounds.streamed import advance_merged
from dare_agg.rounds.terms import UpdateTerms
from dare_agg.vectors.model import GlobalModel, global_model
from dare_agg.vectors.sources import array_source

ROUNDS = 3
SETTINGS = FederatedSettings(server_step=server_step("momentum"))


def base_model(size: int) -> GlobalModel:
    rng = np.random.default_rng(0)
    arrays = {
        "encoder": (rng.normal(size=(size // 50, 50)) * 0.02).astype(np.float32),
        "head": rng.normal(size=30).astype(np.float32),
    }
    return global_model(arrays, dense=["head"])


def one_round(model, state, number, store):
    """A round whose merged delta lies on its masks; some counts widen."""
    terms = UpdateTerms(parse_drop_rate("0.9"))
    plans = make_plans(b"s" * 32, number, [None] * 3, terms, model.ref)
    rng = np.random.default_rng(number)
    merged = np.zeros(model.delta.size, np.float32)
    for plan in plans:
        kept = plan.spec().draw_mask().indices(0, merged.size)
        merged[kept] = rng.normal(size=kept.size).astype(np.float32) * np.float32(2e-4)
    merged[: merged.size // 4] *= 100
    dense = rng.normal(size=model.dense.size).astype(np.float32) * np.float32(0.01)
    source = array_source(merged)
    return advance_merged(model, state, source, dense, SETTINGS, store, plans)


def run(folder: Path, base: GlobalModel, form: str) -> str:
    """Begin a run, or go on with it; returns the fingerprint it ends with."""
    kept, store = StateFolder(folder / "state"), VersionStore(folder / "store", form)
    found, _ = kept.load()
    if found is None:
        model, state, first = store.start(base), StepState(), 1
    else:
        model, state = unpack_model(found, base, store), unpack_step(found)
        first = found.round + 1
    for number in range(first, ROUNDS + 1):
        model, state = one_round(model, state, number, store)
        kept.save(pack_round(number, model, state, {}, store))
    name = store.fingerprint()
    store.close()
    return name


def in_a_process(work: Callable[[], object], after: float | None = None) -> bool:
    """Do work in a process of its own, killed ``after`` seconds; whether it came to its end."""
    child = os.fork()
    if not child:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the run failed by itself"
    return not os.WIFSIGNALED(status)


def die_at(moment: int) -> Callable[[], int]:
    """Have this process end at its n-th dealing with the disk; returns how many there were."""
    met = 0

    def passed() -> bool:
        nonlocal met
        met += 1
        return met == moment

    def killed() -> None:
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)

    def watched(owner: object, name: str, torn: Callable[..., object] | None = None) -> None:
        real = getattr(owner, name)

        def call(*words, **more):
            if passed():
                if torn:
                    torn(real, *words, **more)
                killed()
            done = real(*words, **more)
            if passed():
                killed()
            return done

        setattr(owner, name, call)

    def half(real, handle, data, at):
        real(handle, bytes(data)[: len(data) // 2], at)

    def some(real, counts, where, was, low, high):
        if not isinstance(where, slice):
            half = [None if part is None else part[: where.size // 2] for part in (was, low, high)]
            real(counts, where[: where.size // 2], *half)

    watched(os, "pwrite", half)
    for name in ("fdatasync", "fsync", "replace", "posix_fallocate", "unlink", "ftruncate"):
        watched(os, name)
    watched(CountsFile, "replace_halves", some)
    watched(MappedVector, "flush")
    return lambda: met


@pytest.mark.parametrize("form", ["auto", "union-i8"])
def test_killed_at_every_dealing_with_the_disk(tmp_path: Path, form: str) -> None:
    disk_state._BATCH, before = 3000, disk_state._BATCH
    base = base_model(20_000)
    try:
        expected = run(tmp_path / "undisturbed", base, form)

        def count() -> None:
            asked = die_at(-1)
            run(tmp_path / "counted", base, form)
            (tmp_path / "moments").write_text(str(asked()))

        assert in_a_process(count)
        moments = int((tmp_path / "moments").read_text())
        assert moments > 150
        # A sample that differs from run to run.
        chosen = random.Random(os.getpid()).sample(range(1, moments), 45)
        for moment in sorted(chosen):
            folder = tmp_path / str(moment)

            def killed(moment: int = moment, folder: Path = folder) -> None:
                die_at(moment)
                run(folder, base, form)

            assert not in_a_process(killed), moment
            # And once more on the way back.
            if moment % 3 == 0:
                in_a_process(lambda folder=folder: (die_at(7), run(folder, base, form)))
            assert run(folder, base, form) == expected, moment
    finally:
        disk_state._BATCH = before


def test_killed_at_moments_of_the_clock(tmp_path: Path) -> None:
    base = base_model(400_000)
    started = time.monotonic()
    expected = run(tmp_path / "undisturbed", base, "auto")
    took = time.monotonic() - started
    ended = [
        in_a_process(lambda i=i: run(tmp_path / str(i), base, "auto"), took * (i + 0.5) / 12)
        for i in range(12)
    ]
    assert not all(ended)
    for i in range(12):
        assert run(tmp_path / str(i), base, "auto") == expected


@contextmanager
def no_file_beyond(nbytes: int) -> Iterator[None]:
    """As a full disk, for whatever grows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room", [100, 5_000, 70_000, 200_000])
def test_a_full_disk_in_the_middle_of_a_round_loses_nothing(tmp_path: Path, room: int) -> None:
    base = base_model(200_000)
    plain, store = VersionStore(tmp_path / "a"), VersionStore(tmp_path / "b")
    model, state = one_round(plain.start(base), StepState(), 1, plain)
    one_round(model, state, 2, plain)
    model, state = one_round(store.start(base), StepState(), 1, store)
    with no_file_beyond(room), pytest.raises(StateError, match=os.strerror(errno.EFBIG)):
        one_round(model, state, 2, store)
    if not store.version:  # not even the header could be put back: it is when opened again
        store.restore(base, {"version": np.frombuffer(bytes.fromhex(model.ref.version), np.uint8)})
    assert store.version == model.ref.version
    one_round(store.model, state, 2, store)
    assert store.version == plain.version and store.fingerprint() == plain.fingerprint()


def test_an_undo_file_damaged_inside_is_told(tmp_path: Path) -> None:
    base = base_model(200_000)
    store = VersionStore(tmp_path)
    one_round(store.start(base), StepState(), 1, store)
    store.close()
    path = tmp_path / "undo"
    data = bytearray(path.read_bytes())
    at = bytes(data).index(undo._MARK)
    data[at] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(StateError, match="damaged at byte"):
        VersionStore(tmp_path).start(base)
    data[at] ^= 1
    path.write_bytes(bytes(data))
    assert VersionStore(tmp_path).start(base).ref == base.ref

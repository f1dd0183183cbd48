"""The client on the chain way: every path gives the server's bits, and nothing is trusted."""

import errno
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dare_agg.checkpoint import open_checkpoint, write_checkpoint
from dare_agg.checkpoint.model import model_in
from dare_agg.codec.mask import parse_drop_rate
from dare_agg.downlink.base import BASE_VERSION, CHAIN_NAME, DENSE_STEPS, STEPS, VERIFY
from dare_agg.downlink.following import ChainReceiver
from dare_agg.downlink.forms import FORMS
from dare_agg.downlink.lossless import encode_counts
from dare_agg.downlink.step_form import StepHead
from dare_agg.downlink.steps import Step, payload_of, write_step
from dare_agg.downlink.store import VersionStore
from dare_agg.downlink.ways import WAYS, Place
from dare_agg.errors import BaseMismatchError, StateError
from dare_agg.rounds.plan import make_plans
from dare_agg.rounds.terms import UpdateTerms
from dare_agg.vectors.model import GlobalModel
from dare_agg.vectors.sources import take


class Server:
    """A run on the chain way: the store, and what each of its versions was."""

    def __init__(self, base: GlobalModel, folder: Path, form: str = "auto") -> None:
        self.base, self.store = base, VersionStore(folder, form)
        self.model = self.store.start(base)
        self.versions = [base.ref.version]
        self.models = [self._copied()]
        self.random = np.random.default_rng(6)

    def _copied(self) -> GlobalModel:
        return self.model.placed(self.model.delta[:], self.model.dense)

    @property
    def steps(self) -> list[Step]:
        return list(self.store.steps)

    def advance(self) -> None:
        terms = UpdateTerms(parse_drop_rate("0.9"))
        plans = make_plans(b"s" * 32, len(self.versions), [None] * 3, terms, self.model.ref)
        change = np.zeros(self.model.delta.size, np.float32)
        for plan in plans:
            kept = plan.spec().draw_mask().indices(0, change.size)
            change[kept] += self.random.normal(0, 0.01, kept.size).astype(np.float32)
        dense = self.random.normal(0, 0.01, self.model.dense.size).astype(np.float32)
        self.model = self.store.advance(self.model, change, dense, plans)
        self.versions.append(self.model.ref.version)
        self.models.append(self._copied())

    def from_base(self) -> Step:
        return self.store.summed(self.versions[0])

    def sent(self, have: str) -> dict[str, bytes]:
        found = self.store.broadcast(self.model, have).payloads
        return {name: bytes(payload) for name, payload in found.items()}


def payloads(*steps: Step) -> dict[str, bytes]:
    return {
        STEPS: b"".join(step.body for step in steps),
        DENSE_STEPS: b"".join(step.dense for step in steps),
    }


@pytest.fixture
def base(tmp_path: Path) -> GlobalModel:
    random = np.random.default_rng(1)
    arrays = {
        "wide": random.normal(size=(90, 50)).astype(np.float32),
        "brain": random.normal(size=(40, 50)).astype(np.float32),
        "half": random.normal(size=(10, 8)).astype(np.float16),
        "zero": np.full((7, 11), -0.0, np.float32),
        "norm.running_var": np.ones(9, np.float32),
        "steps": np.array(5),
        "table": np.arange(500),
    }
    write_checkpoint(tmp_path / "base.safetensors", arrays, dtypes={"brain": "BF16"})
    return model_in(open_checkpoint(tmp_path / "base.safetensors"))


@pytest.fixture
def server(base: GlobalModel, tmp_path: Path) -> Server:
    server = Server(base, tmp_path / "store")
    for _ in range(4):
        server.advance()
    return server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def receiver(folder: Path, base: GlobalModel | None, **words: str) -> ChainReceiver:
    name = "0" * 64 if base is None else base.ref.version
    return ChainReceiver(folder, "3", base, words.pop("base_version", name), **words)


def same(found: GlobalModel, server: Server, number: int = -1) -> None:
    expected = server.models[number]
    assert found.ref.version == server.versions[number]
    assert found.fingerprints == expected.fingerprints
    np.testing.assert_array_equal(found.delta[:], expected.delta[:])
    positions = np.arange(0, expected.delta.size, 3)
    np.testing.assert_array_equal(take(found.delta, positions), expected.delta[:][positions])
    theirs = expected.arrays()
    for name, array in found.arrays().items():
        assert array.dtype == theirs[name].dtype
        np.testing.assert_array_equal(array, theirs[name])


@pytest.mark.parametrize("form", FORMS)
def test_every_path_gives_the_servers_bits(
    base: GlobalModel, folder: Path, tmp_path: Path, form: str
) -> None:
    server = Server(base, tmp_path / "store", form)
    for number in range(1, 5):
        server.advance()
        each = receiver(folder / "each", base)
        same(each.follow(server.versions[-1], server.sent(each.have())), server)
        assert receiver(folder / "each", base).have() == server.versions[number]
        if number % 2 == 0:
            two = payloads(*server.steps[-2:])
            same(receiver(folder / "seldom", base).follow(server.versions[-1], two), server)
    fresh = receiver(folder / "new", base)
    assert fresh.have() == base.ref.version and not fresh.wants_base()
    same(fresh.follow(server.versions[-1], payloads(server.from_base())), server)
    same(receiver(folder / "each", base).follow(server.versions[-1], {}), server)


def test_the_base_itself_is_the_first_version(base: GlobalModel, folder: Path) -> None:
    found = receiver(folder, base)
    assert found.follow(base.ref.version, {}) is base is found.followed()
    assert found.receive(base.ref.version, {}, None).keys() == base.arrays().keys()


def test_the_way_is_a_row_of_the_table(server: Server, folder: Path) -> None:
    place = Place(folder, "3", base=server.base)
    facts = {BASE_VERSION: server.versions[0], VERIFY: server.model.fingerprints.version}
    found = WAYS[CHAIN_NAME].receive(place, facts)
    arrays = found.receive(server.versions[-1], payloads(*server.steps), None)
    np.testing.assert_array_equal(arrays["wide"], server.model.arrays()["wide"])
    followed = found.followed()
    assert followed is not None
    same(followed, server)


def test_a_reply_that_was_lost_costs_no_round(server: Server, folder: Path) -> None:
    receiver(folder, server.base).follow(server.versions[2], payloads(*server.steps[:2]))
    again = receiver(folder, server.base)
    same(again.follow(server.versions[4], payloads(*server.steps[1:])), server)
    same(
        receiver(folder, server.base).follow(server.versions[4], payloads(server.steps[3])), server
    )


def test_steps_that_do_not_follow_are_refused_and_nothing_is_lost(
    server: Server, folder: Path
) -> None:
    receiver(folder, server.base).follow(server.versions[2], payloads(*server.steps[:2]))
    forged = replace(server.steps[2].head, child="ab" * 32)
    steps = server.steps
    for version, sent in (
        (4, payloads(steps[2])),
        (4, payloads(steps[3], steps[2])),
        (4, {STEPS: steps[2].body[:-1]}),
        (4, {STEPS: b"".join([steps[2].body, b"more"])}),
        (4, payloads(write_step(forged, payload_of(steps[2]), steps[2].dense))),
    ):
        with pytest.raises(BaseMismatchError):
            receiver(folder, server.base).follow(server.versions[version], sent)
        assert receiver(folder, server.base).have() == server.versions[2]
    same(receiver(folder, server.base).follow(server.versions[4], payloads(*steps[2:])), server)
    # From a version that this client is not at, its head is of no use.
    with pytest.raises(BaseMismatchError, match="is asked for again"):
        receiver(folder, server.base).follow(server.versions[3], payloads(steps[2]))
    assert receiver(folder, server.base).have() == server.versions[0]


def test_a_step_that_goes_beyond_the_grid_is_refused(server: Server, folder: Path) -> None:
    counts = np.zeros(server.base.delta.size, np.int32)
    counts[5] = 2**31 - 1
    head = StepHead("lossless", "f32", "f32", 1, server.versions[0], "0" * 64, bytes(16))
    one = write_step(replace(head, child="cd" * 32), encode_counts(counts), b"")
    two = write_step(replace(head, parent="cd" * 32, child="ef" * 32), encode_counts(counts), b"")
    with pytest.raises(StateError, match="grid steps from the base"):
        receiver(folder, server.base).follow("ef" * 32, payloads(one, two))
    assert receiver(folder, server.base).have() == server.versions[0]


def test_a_full_disk_is_said_and_nothing_is_lost(
    server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    sent = payloads(server.from_base())
    with monkeypatch.context() as patch:
        patch.setattr("os.posix_fallocate", full)
        with pytest.raises(StateError, match=r"No space left on device; free space"):
            receiver(folder, server.base).follow(server.versions[4], sent)
    assert receiver(folder, server.base).have() == server.versions[0]
    same(receiver(folder, server.base).follow(server.versions[4], sent), server)


def _head(folder: Path, suffix: str) -> Path:
    (path,) = (folder / "heads").glob(f"*{suffix}")
    return path


@pytest.mark.parametrize("suffix", [".counts", ".dense", ".counts.high"])
@pytest.mark.parametrize("how", ["cut", "foreign", "gone"])
def test_a_damaged_head_is_forgotten_and_one_sum_comes(
    server: Server, folder: Path, suffix: str, how: str
) -> None:
    receiver(folder, server.base).follow(server.versions[3], payloads(*server.steps[:3]))
    path = _head(folder, suffix)
    if how == "gone":
        path.unlink()
    elif how == "cut":
        os.truncate(path, path.stat().st_size - 1)
    else:
        path.write_bytes(os.urandom(path.stat().st_size + 1))
    found = receiver(folder, server.base)
    assert found.have() == server.versions[0]
    with pytest.raises(BaseMismatchError, match="is asked for again"):
        found.follow(server.versions[4], payloads(server.steps[3]))
    same(found.follow(server.versions[4], payloads(server.from_base())), server)


def test_counts_of_another_base_are_not_taken(server: Server, folder: Path, tmp_path: Path) -> None:
    receiver(folder, server.base).follow(server.versions[1], payloads(server.steps[0]))
    arrays = {name: np.array(array) for name, array in server.base.arrays().items()}
    arrays["wide"] = arrays["wide"] + 1
    write_checkpoint(tmp_path / "other.safetensors", arrays)
    other = model_in(open_checkpoint(tmp_path / "other.safetensors"))
    with pytest.raises(BaseMismatchError, match="this client's base has fingerprint"):
        receiver(folder, other, base_version=server.versions[0])
    ours, theirs = _head(folder, ".counts"), receiver(folder, other)
    for suffix in (".counts", ".counts.high", ".dense", ".dense.high"):
        name = f"{ours.stem[:12]}-{other.ref.version[:16]}{suffix}"
        _head(folder, suffix).rename(ours.with_name(name))
    assert theirs.have() == other.ref.version


def test_without_the_base_nothing_can_be_followed(server: Server, folder: Path) -> None:
    found = receiver(folder, None, base_version=server.versions[0])
    assert found.have() == "" and found.wants_base()
    with pytest.raises(BaseMismatchError, match="is not on this machine"):
        found.follow(server.versions[4], payloads(*server.steps))
    with pytest.raises(BaseMismatchError, match="64 hex digits"):
        receiver(folder, None, base_version="../../etc")


def test_a_fingerprint_that_differs_names_the_round(server: Server, folder: Path) -> None:
    good, bad = server.model.fingerprints.version, server.models[1].fingerprints.version
    sent = payloads(*server.steps)
    same(receiver(folder, server.base, verify=good).follow(server.versions[4], sent), server)
    with pytest.raises(BaseMismatchError, match=f"of an earlier round has fingerprint {good[:12]}"):
        receiver(folder, server.base, verify=bad).follow(server.versions[4], {})
    assert receiver(folder, server.base).have() == server.versions[0]
    with pytest.raises(BaseMismatchError, match=r"of round 4 has fingerprint"):
        receiver(folder, server.base, verify=bad).follow(server.versions[4], sent)


def test_a_version_that_was_left_is_not_read_as_the_next(server: Server, folder: Path) -> None:
    first = receiver(folder, server.base).follow(server.versions[1], payloads(server.steps[0]))
    receiver(folder, server.base).follow(server.versions[2], payloads(server.steps[1]))
    for read in (lambda: first.delta[:9], lambda: take(first.delta, np.array([3, 8]))):
        with pytest.raises(BaseMismatchError, match="has moved on while it was being read"):
            read()
    # Begun anew from the base, the file is another one, and the old reads on as it was.
    second = receiver(folder, server.base).follow(server.versions[2], {})
    receiver(folder, server.base).follow(server.versions[4], payloads(server.from_base()))
    same(second, server, 2)


def test_the_base_is_not_read_for_its_grid_again(
    server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    receiver(folder, server.base).follow(server.versions[3], payloads(*server.steps[:3]))
    monkeypatch.setattr("dare_agg.downlink.grid_file.grid_of", None)
    same(
        receiver(folder, server.base).follow(server.versions[4], payloads(server.steps[3])), server
    )


_FOLLOWS = """
import sys
from pathlib import Path
from dare_agg.checkpoint import open_checkpoint
from dare_agg.checkpoint.model import model_in
from dare_agg.downlink.base import DENSE_STEPS, STEPS
from dare_agg.downlink.following import ChainReceiver

base, folder, sent, dense, version = sys.argv[1:]
model = model_in(open_checkpoint(base))
payloads = {STEPS: Path(sent).read_bytes(), DENSE_STEPS: Path(dense).read_bytes()}
for _ in range(20):
    receiver = ChainReceiver(Path(folder), "3", model, model.ref.version)
    print(receiver.follow(version, payloads).fingerprints.version)
"""


def test_two_processes_of_one_client_do_not_disturb_each_other(
    server: Server, folder: Path, tmp_path: Path
) -> None:
    receiver(folder, server.base).follow(server.versions[2], payloads(*server.steps[:2]))
    paths = [tmp_path / "steps", tmp_path / "dense"]
    for path, payload in zip(paths, payloads(*server.steps[2:]).values(), strict=True):
        path.write_bytes(payload)
    words = [str(w) for w in (tmp_path / "base.safetensors", folder, *paths, server.versions[4])]
    command = [sys.executable, "-c", _FOLLOWS, *words]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[0] for process in both]
    assert all(process.returncode == 0 for process in both)
    assert {*"".join(said).split()} == {server.model.fingerprints.version}
    assert receiver(folder, server.base).have() == server.versions[4]


_KILLED = """
import os, signal, sys
from pathlib import Path
from dare_agg.checkpoint import open_checkpoint
from dare_agg.checkpoint.model import model_in
from dare_agg.downlink import following
from dare_agg.downlink.base import DENSE_STEPS, STEPS

base, folder, sent, dense, version, left = sys.argv[1:]
apply, left = following.apply_step, int(left)

def dies(*arguments):
    global left
    apply(*arguments)
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)

following.apply_step = dies
model = model_in(open_checkpoint(base))
receiver = following.ChainReceiver(Path(folder), "3", model, model.ref.version)
receiver.follow(version, {STEPS: Path(sent).read_bytes(), DENSE_STEPS: Path(dense).read_bytes()})
"""


@pytest.mark.parametrize("after", [1, 2])
def test_killed_in_the_middle_of_following_one_sum_is_enough(
    server: Server, folder: Path, tmp_path: Path, after: int
) -> None:
    receiver(folder, server.base).follow(server.versions[2], payloads(*server.steps[:2]))
    sent = payloads(*server.steps[2:])
    paths = [tmp_path / "steps", tmp_path / "dense"]
    for path, payload in zip(paths, sent.values(), strict=True):
        path.write_bytes(payload)
    words = [tmp_path / "base.safetensors", folder, *paths, server.versions[4], after]
    ran = subprocess.run([sys.executable, "-c", _KILLED, *map(str, words)], check=False)
    assert ran.returncode == -signal.SIGKILL
    found = receiver(folder, server.base)
    assert found.have() == server.versions[0]
    same(found.follow(server.versions[4], payloads(server.from_base())), server)


_PROBE = """
import sys
from pathlib import Path
from dare_agg.checkpoint import open_checkpoint
from dare_agg.checkpoint.model import model_in
from dare_agg.downlink.base import STEPS
from dare_agg.downlink.following import ChainReceiver
from dare_agg.downlink.forms import FORMS
from dare_agg.downlink.lossless import encode_counts
from dare_agg.downlink.step_form import StepHead
from dare_agg.downlink.steps import write_step
import numpy as np
from simulations.runs.memory import Peak, memory_of

before = memory_of()[0]
with Peak(period=0.005) as peak:
    base = model_in(open_checkpoint(sys.argv[1]))
    some = np.zeros(1 << 20, np.int32)
    some[::100] = 40_000
    tile = encode_counts(some)
    head = StepHead("lossless", "f32", "f32", 1, base.ref.version, "ab" * 32, bytes(16))
    step = write_step(head, tile * (base.delta.size >> 20), b"")
    model = ChainReceiver(Path(sys.argv[2]), "0", base, base.ref.version).follow(
        "ab" * 32, {STEPS: step.body}
    )
    assert model.fingerprints.version != base.ref.version
print((peak.own - before) >> 20)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    # 64 M parameters.
    rows = 1 << 16
    shape = {"dtype": "BF16", "shape": [rows, 1024], "data_offsets": [0, rows * 2048]}
    text = json.dumps({"w": shape}).encode()
    text += b" " * (-len(text) % 8)
    with (tmp_path / "base.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + rows * 2048)
    words = [str(tmp_path / "base.safetensors"), str(tmp_path / "cache")]
    ran = subprocess.run(
        [sys.executable, "-c", _PROBE, *words], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) < 150

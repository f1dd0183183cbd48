"""Versions: every path leads to the same bits, what was left out is kept, nothing is trusted."""

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dare_agg.codec.mask import parse_drop_rate
from dare_agg.downlink.base import BASE, STEPS, read_base, write_base
from dare_agg.downlink.client import VersionReceiver
from dare_agg.downlink.forms import FORMS
from dare_agg.downlink.grid import add_steps, grid_of
from dare_agg.downlink.steps import HEAD, apply_step, read_steps
from dare_agg.downlink.ways import make_downlink
from dare_agg.errors import BaseMismatchError, ConfigError, DareError, StateError, UpdateError
from dare_agg.files.state_file import read_state, write_state
from dare_agg.rounds.plan import make_plans
from dare_agg.rounds.terms import UpdateTerms
from dare_agg.vectors.model import global_model


def base_arrays(size: int = 5000) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    head = rng.normal(size=(4, 30)).astype(np.float32)
    head[2] = -0.0
    return {
        "wide": rng.normal(size=(size // 50, 50)).astype(np.float32),
        "small": (rng.normal(size=300) * 1e-3).astype(np.float32),
        "zero": np.zeros(77, np.float32),
        # Pretrained encoders hold a few of these; their sign is part of the fingerprint.
        "negative zero": np.full(77, -0.0, np.float32),
        "half": rng.normal(size=40).astype(np.float16),
        "head.weight": head,
        "count": np.asarray(3, np.int64),
    }


def grow(downlink, model, rounds, *, p="0.9", clients=4, dense_steps=False, seed=0):
    """Advance some rounds with sparse steps on the rounds' masks; yields each model."""
    rng = np.random.default_rng(seed)
    terms = UpdateTerms(parse_drop_rate(p))
    for number in rounds:
        plans = make_plans(b"s" * 32, number, [None] * clients, terms, model.ref)
        step = np.zeros(model.delta.size, np.float32)
        for plan in plans:
            kept = plan.spec().draw_mask().indices(0, step.size)
            step[kept] += rng.normal(size=kept.size).astype(np.float32) * np.float32(0.01)
        if dense_steps:
            step += rng.normal(size=step.size).astype(np.float32) * np.float32(0.01)
        head = rng.normal(size=model.dense.size).astype(np.float32) * np.float32(0.01)
        model = downlink.advance(model, step, head, plans)
        yield model


def started(form="auto", **options):
    downlink = make_downlink(form, **options)
    model = downlink.start(global_model(base_arrays(), dense=["^head"]))
    return downlink, model


def follow(downlink, model, steps, start):
    delta, dense = downlink._groups()
    counts, dense_counts = start
    for step in read_steps(b"".join(s.body for s in steps), b"".join(s.dense for s in steps)):
        apply_step(step, delta.grid, counts, dense.grid, dense_counts)
    return model.placed(
        delta.grid.values(delta.base, counts), dense.grid.values(dense.base, dense_counts)
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dense_steps", [False, True])
def test_every_path_gives_the_same_bits(form, dense_steps):
    downlink, model = started(form)
    delta, dense = downlink._groups()
    states = [(delta.counts.copy(), dense.counts.copy())]
    versions = [model.ref.version]
    for moved in grow(downlink, model, range(1, 6), dense_steps=dense_steps):
        states.append((delta.counts.copy(), dense.counts.copy()))
        versions.append(moved.ref.version)
    assert len(set(versions)) == 6
    for place, version in enumerate(versions[:-1]):
        for path in (downlink.path(version), [downlink.summed(version)], downlink.steps[place:]):
            start = tuple(part.copy() for part in states[place])
            reached = follow(downlink, moved, path, start)
            assert reached.ref.version == versions[-1]
            assert reached.delta.tobytes() == moved.delta.tobytes()


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**32), st.lists(st.booleans(), min_size=1, max_size=6), st.integers(1, 5))
def test_a_client_that_comes_and_goes_ends_at_the_servers_bits(tmp_path_factory, seed, there, n):
    folder = tmp_path_factory.mktemp("cache")
    downlink, model = started()
    receiver = VersionReceiver(folder, "one", downlink.base_version, dense=("^head",))
    rounds = range(1, len(there) + 1)
    for online, moved in zip(
        there, grow(downlink, model, rounds, clients=n, seed=seed), strict=True
    ):
        if online:
            sent = downlink.broadcast(moved, receiver.have())
            arrays = receiver.receive(moved.ref.version, sent.payloads, None)
            assert global_model(arrays, dense=["^head"]).ref == moved.ref
            assert receiver.have() == moved.ref.version
    sent = downlink.broadcast(moved, "")
    other = VersionReceiver(folder, "two", downlink.base_version, dense=("^head",))
    arrays = other.receive(moved.ref.version, sent.payloads, None)
    assert list(arrays) == list(base_arrays())
    assert global_model(arrays, dense=["^head"]).ref == moved.ref


def test_the_union_costs_a_bit_a_survivor_and_no_index():
    downlink, model = started("union-b1")
    *_, _ = grow(downlink, model, [1], p="0.99", clients=5)
    step = downlink.steps[0]
    union = step.head.survivors
    assert union <= 5 * -(-model.delta.size // 100)
    assert len(step.body) <= HEAD.size + 33 + union / 8 + 4 * (union / 128 + 130)


@pytest.mark.parametrize("form", ["dense-b1", "union-b1", "dense-i8", "lossless"])
def test_feedback_keeps_what_coding_left(form):
    """What was asked for is what was applied plus what is still owed."""
    downlink, model = started(form)
    asked = np.zeros(model.delta.size, np.float64)
    rng = np.random.default_rng(5)
    first = model.delta.astype(np.float64)
    for number in range(1, 30):
        plans = make_plans(
            b"s" * 32, number, [None], UpdateTerms(parse_drop_rate("0.9")), model.ref
        )
        step = (rng.normal(size=asked.size) * 0.01).astype(np.float32)
        asked += step
        model = downlink.advance(model, step, None, plans)
    delta, _ = downlink._groups()
    steps = np.repeat(
        [2.0**-e for e in delta.grid.exponents], [e.size for e in delta.grid.layout.entries]
    )
    applied = delta.counts * steps
    np.testing.assert_allclose(applied + delta.rest, asked, atol=2e-6)
    if form == "dense-b1":  # the debt does not grow with the rounds
        moved = model.delta.astype(np.float64) - first
        assert np.linalg.norm(moved - asked) < 0.6 * np.linalg.norm(asked)


def test_old_steps_go_and_the_exact_sum_serves():
    downlink, model = started("union-b1", keep_bytes=1500)
    *_, last = grow(downlink, model, range(1, 8))
    assert len(downlink.steps) < 7
    start = tuple(np.zeros_like(g.counts) for g in downlink._groups())
    sent = downlink.broadcast(last, downlink.base_version)
    assert BASE not in sent.payloads
    assert follow(downlink, last, downlink.path(downlink.base_version), start).ref == last.ref


def test_resume_goes_on_with_the_same_bits():
    one, model = started()
    *_, middle = grow(one, model, range(1, 4))
    saved = {name: array.copy() for name, array in one.state_arrays().items()}
    two, base = started()
    again = two.restore(base, saved)
    assert again.ref == middle.ref
    assert two.start(again) is again
    first = [m.ref.version for m in grow(one, middle, range(4, 7), seed=9)]
    second = [m.ref.version for m in grow(two, again, range(4, 7), seed=9)]
    assert first == second
    assert [s.body for s in one.steps] == [s.body for s in two.steps]


def test_restore_refuses_another_models_state():
    one, model = started()
    *_, _ = grow(one, model, [1])
    saved = dict(one.state_arrays())
    for wrong in ({**saved, "counts": np.zeros(3, np.int32)}, {"counts": saved["counts"]}):
        two, base = started()
        with pytest.raises(StateError, match="older round"):
            two.restore(base, wrong)
    two, base = started()
    with pytest.raises(StateError, match="its last step"):
        two.restore(base, {**saved, "counts": saved["counts"] + 1})


@functools.cache
def a_step():
    downlink, model = started()
    *_, _ = grow(downlink, model, [1])
    return downlink.steps[0]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_steps_are_typed_errors(data):
    step = a_step()
    body = bytearray(step.body)
    if data.draw(st.booleans()):
        body = body[: data.draw(st.integers(1, len(body) - 1))]
    else:
        body[data.draw(st.integers(0, len(body) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(UpdateError):
        read_steps(bytes(body), step.dense)


def test_a_lossless_bomb_is_refused():
    import struct
    import zlib

    from dare_agg.downlink.step_form import StepHead
    from dare_agg.downlink.steps import write_step

    downlink, _ = started()
    delta, dense = downlink._groups()
    bomb = zlib.compress(bytes(1 << 24))
    head = StepHead("lossless", "f32", "f32", 1, "00" * 32, "00" * 32, bytes(16))
    step = write_step(head, struct.pack("<I", len(bomb)) + bomb, b"")
    with pytest.raises(UpdateError, match="are due"):
        apply_step(step, delta.grid, delta.counts, dense.grid, dense.counts)


def test_files_that_are_not_whole_are_asked_for_again(tmp_path):
    downlink, model = started()
    receiver = VersionReceiver(tmp_path, "c", downlink.base_version, dense=("^head",))
    steps = grow(downlink, model, range(1, 4))
    first = next(steps)
    receiver.receive(first.ref.version, downlink.broadcast(first, "").payloads, None)
    second = next(steps)
    head = receiver._head_path
    whole = head.read_bytes()
    head.write_bytes(whole[:-40] + bytes([whole[-40] ^ 1]) + whole[-39:])
    sent = downlink.broadcast(second, receiver.have())
    with pytest.raises(BaseMismatchError, match="asked for again"):
        receiver.receive(second.ref.version, sent.payloads, None)
    assert receiver.have() == downlink.base_version  # the base still serves
    sent = downlink.broadcast(second, receiver.have())
    assert BASE not in sent.payloads
    receiver.receive(second.ref.version, sent.payloads, None)
    third = next(steps)
    receiver._base_path.write_bytes(receiver._base_path.read_bytes()[:-100])
    sent = downlink.broadcast(third, receiver.have())
    with pytest.raises(BaseMismatchError, match="asked for again"):
        receiver.receive(third.ref.version, sent.payloads, None)
    assert receiver.have() == ""
    receiver.receive(third.ref.version, downlink.broadcast(third, "").payloads, None)
    assert receiver.have() == third.ref.version


@pytest.mark.parametrize("facts", [7, {}, {"version": 5}, {"version": None}, {"version": "x" * 9}])
def test_a_head_of_other_facts_is_asked_for_again(tmp_path, facts):
    downlink, model = started()
    (moved,) = grow(downlink, model, [1])
    receiver = VersionReceiver(tmp_path, "client", downlink.base_version, dense=("^head",))
    receiver.receive(moved.ref.version, downlink.broadcast(moved, "").payloads, None)
    (head,) = (tmp_path / "heads").iterdir()
    arrays, _ = read_state(head)
    write_state(head, arrays, facts)
    assert receiver.have() == downlink.base_version
    with pytest.raises(BaseMismatchError):
        receiver.receive(moved.ref.version, {}, None)


def test_a_step_sent_twice_moves_once(tmp_path):
    downlink, model = started()
    receiver = VersionReceiver(tmp_path, "c", downlink.base_version, dense=("^head",))
    assert receiver.adopt(base_arrays())
    steps = grow(downlink, model, range(1, 3))
    first = next(steps)
    sent = downlink.broadcast(first, downlink.base_version)
    for _ in range(2):
        arrays = receiver.receive(first.ref.version, sent.payloads, None)
        assert global_model(arrays, dense=["^head"]).ref == first.ref
    second = next(steps)
    sent = downlink.broadcast(second, downlink.base_version)
    arrays = receiver.receive(second.ref.version, sent.payloads, None)
    assert global_model(arrays, dense=["^head"]).ref == second.ref


def test_the_cache_is_bounded(tmp_path):
    for number in range(5):
        arrays = base_arrays()
        arrays["wide"] = arrays["wide"] + np.float32(number)
        downlink = make_downlink("auto")
        model = downlink.start(global_model(arrays, dense=["^head"]))
        receiver = VersionReceiver(
            tmp_path, "c", downlink.base_version, dense=("^head",), keep_bytes=60_000
        )
        sent = downlink.broadcast(model, receiver.have())
        receiver.receive(model.ref.version, sent.payloads, None)
    assert sum(p.stat().st_size for p in tmp_path.glob("*/*")) <= 60_000
    assert receiver.have() == downlink.version


def test_a_wrong_base_is_not_adopted(tmp_path):
    downlink, _ = started()
    receiver = VersionReceiver(tmp_path, "c", downlink.base_version, dense=("^head",))
    other = base_arrays()
    other["zero"] = other["zero"] + np.float32(1)
    assert not receiver.adopt(other)
    assert receiver.have() == ""


def test_counts_beyond_int32_are_refused():
    counts = np.full(3, 2**31 - 2, np.int32)
    with pytest.raises(StateError, match="grid steps"):
        add_steps(counts, np.arange(3), np.array([0, 5, 0]))
    assert (counts == 2**31 - 2).all()


def test_what_never_moved_keeps_its_bits():
    model = global_model(base_arrays(), dense=["^head"])
    for layout, base in (
        (model.groups.layout, model.delta),
        (model.groups.dense_layout, model.dense),
    ):
        grid = grid_of(layout, base, model.groups.dtypes)
        counts = np.zeros(base.size, np.int32)
        counts[::3] = 5
        still = counts == 0
        assert grid.values(base, counts)[still].tobytes() == base[still].tobytes()
        assert np.signbit(base[still]).any()


def test_grid_steps_follow_the_largest_base_value():
    model = global_model(base_arrays(), dense=["^head"])
    grid = grid_of(model.groups.layout, model.delta, model.groups.dtypes)
    for entry, exponent in zip(grid.layout.entries, grid.exponents, strict=True):
        largest = float(np.abs(model.delta[entry.offset : entry.stop]).max())
        ulp = float(np.spacing(np.float32(max(largest, 2.0**-6))))
        assert 2.0**-exponent == ulp


@pytest.mark.parametrize(
    "make",
    [
        lambda: make_downlink("union"),
        lambda: make_downlink("auto", denze_values="i8"),
        lambda: make_downlink("auto", dense_values="i9"),
        lambda: make_downlink("dare-b1", drop_rate="1"),
    ],
)
def test_wrong_settings_are_refused(make):
    with pytest.raises(ConfigError):
        make()


def test_a_foreign_model_is_not_advanced():
    downlink, model = started()
    *_, _ = grow(downlink, model, [1])
    with pytest.raises(DareError, match="same round"):
        list(grow(downlink, model, [2]))
    assert STEPS not in downlink.broadcast(downlink._model, downlink.version).payloads


def test_a_base_file_reads_back_in_order_and_a_broken_one_is_named(tmp_path):
    path = tmp_path / "base.safetensors"
    path.write_bytes(write_base(base_arrays()))
    read = read_base(path)
    assert list(read) == list(base_arrays())
    assert all(read[name].tobytes() == a.tobytes() for name, a in base_arrays().items())
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(StateError, match=r"base\.safetensors cannot be read"):
        read_base(path)
    with pytest.raises(StateError, match="cannot be read"):
        read_base(tmp_path / "none")


def test_a_cache_that_cannot_be_written_costs_bytes_and_no_round(tmp_path, caplog):
    downlink, model = started()
    (tmp_path / "cache").write_text("no folder")
    receiver = VersionReceiver(tmp_path / "cache", "c", downlink.base_version, dense=("^head",))
    for moved in grow(downlink, model, range(1, 3)):
        assert receiver.have() == ""
        sent = downlink.broadcast(moved, receiver.have())
        assert BASE in sent.payloads
        arrays = receiver.receive(moved.ref.version, sent.payloads, None)
        assert global_model(arrays, dense=["^head"]).ref == moved.ref
    assert "fix the permissions" in caplog.text

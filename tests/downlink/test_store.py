"""The store on disk: the same bits as in memory where the rest is exact, whole after any end."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest

from dare_agg.codec.mask import parse_drop_rate
from dare_agg.downlink import coded_forms, lossless
from dare_agg.downlink.base import STEPS
from dare_agg.downlink.disk import header
from dare_agg.downlink.disk import state as disk_state
from dare_agg.downlink.forms import FORMS, STEP_FORMS
from dare_agg.downlink.grid import grid_of
from dare_agg.downlink.server import VersionDownlink
from dare_agg.downlink.step_form import StepHead
from dare_agg.downlink.steps import apply_step, check_chain, families_of, read_steps
from dare_agg.downlink.store import VersionStore
from dare_agg.errors import ConfigError, NonFiniteError, StateError
from dare_agg.rounds.plan import make_plans
from dare_agg.rounds.terms import UpdateTerms
from dare_agg.vectors.model import GlobalModel, global_model
from dare_agg.vectors.tiled import TiledVector, retiled


def base_model(size: int = 5000, seed: int = 1) -> GlobalModel:
    rng = np.random.default_rng(seed)
    arrays = {
        "wide": rng.normal(size=(size // 50, 50)).astype(np.float32),
        "small": (rng.normal(size=300) * 1e-3).astype(np.float32),
        "zero": np.zeros(77, np.float32),
        "negative zero": np.full(77, -0.0, np.float32),
        "half": rng.normal(size=40).astype(np.float16),
        "head.weight": rng.normal(size=(4, 30)).astype(np.float32),
        "count": np.asarray(3, np.int64),
    }
    return global_model(arrays, dense=["^head"])


def round_of(model, number, *, p="0.9", clients=4, off=False, seed=0, size=0.01):
    """A round's step on its masks (and everywhere with ``off``), dense step and plans."""
    rng = np.random.default_rng([seed, number])
    plans = make_plans(
        b"s" * 32, number, [None] * clients, UpdateTerms(parse_drop_rate(p)), model.ref
    )
    step = np.zeros(model.delta.size, np.float32)
    for plan in plans:
        kept = plan.spec().draw_mask().indices(0, step.size)
        step[kept] += rng.normal(size=kept.size).astype(np.float32) * np.float32(size)
    if off:
        step += rng.normal(size=step.size).astype(np.float32) * np.float32(size)
    head = rng.normal(size=model.dense.size).astype(np.float32) * np.float32(size)
    return step, head, plans


def grow(downlink, model, rounds, **words):
    for number in rounds:
        model = downlink.advance(model, *round_of(model, number, **words))
    return model


def in_whole_steps(store, step, head, plans):
    """A round's words with a step that leaves no rest where it is sent exactly."""
    grid, at = store._settled_grid(), np.arange(step.size)
    return grid.value_at(at, grid.round_at(at, step)), head, plans


def files_of(folder: Path) -> dict[str, bytes]:
    """What a store holds, but for undo, lock and the steps that only a later round removes."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name not in ("undo", "lock") and p.suffix != ".step"
    }


@pytest.mark.parametrize("off", [False, True])
@pytest.mark.parametrize("form", ["lossless", "dare-b1"])
def test_where_the_rest_is_exact_values_are_those_of_the_way_in_memory(tmp_path, form, off):
    base = base_model()
    store, plain = VersionStore(tmp_path, form), VersionDownlink(form)
    model, other = store.start(base), plain.start(base)
    for number in range(1, 6):
        # Keys are made of the parent's name: the same for both, so that only the store differs.
        plain.version = model.ref.version
        other = dataclasses.replace(other, named=model.ref)
        words = in_whole_steps(store, *round_of(model, number, off=off))
        model, other = store.advance(model, *words), plain.advance(other, *words)
        np.testing.assert_array_equal(model.delta[:].view(np.int32), other.delta.view(np.int32))
        np.testing.assert_array_equal(model.dense, other.dense)
        assert store.fingerprint() == other.ref.version


@pytest.mark.parametrize("off", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_every_path_gives_the_same_bits(tmp_path, form, off):
    base = base_model()
    store = VersionStore(tmp_path, form)
    model = store.start(base)
    assert model.ref == base.ref
    models = [(model.ref.version, np.zeros(base.delta.size, np.int32))]
    for number in range(1, 6):
        model = store.advance(model, *round_of(model, number, off=off))
        models.append((model.ref.version, store._files().counts[:]))
        np.testing.assert_array_equal(
            model.delta[:], store._settled_grid().values(base.delta, models[-1][1])
        )
    dense = store._dense_group()
    for place, (version, counts) in enumerate(models[:-1]):
        for path in (store.path(version), [store.summed(version)], store.steps[place:]):
            found, dense_found = counts.copy(), np.zeros_like(dense.counts)
            sent = read_steps(b"".join(s.body for s in path), b"".join(s.dense for s in path))
            for step in sent:
                check_chain(step)
                apply_step(step, store._settled_grid(), found, dense.grid, dense_found)
            np.testing.assert_array_equal(found, models[-1][1])
            if not place:
                np.testing.assert_array_equal(dense_found, dense.counts)
    sent = store.broadcast(model, "")
    assert not sent.full and read_steps(sent.payloads[STEPS], sent.payloads["dense-steps"])
    assert store.broadcast(model, model.ref.version).payloads == {}


@pytest.mark.parametrize("values", ["b1", "b2", "i8", "f16", "f32"])
@pytest.mark.parametrize("name", STEP_FORMS)
def test_a_change_in_tiles_gives_the_bytes_and_steps_of_the_whole(name, values, monkeypatch):
    for module in (coded_forms, lossless):
        monkeypatch.setattr(module, "TILE", 20_000)
    model = base_model(150_000)
    step, _, plans = round_of(model, 1)
    grid, form = grid_of(model.groups.layout, model.delta), STEP_FORMS[name]
    masks = form.masks(families_of(plans), parse_drop_rate("0.7"), bytes(16))
    head = StepHead(name, values, "i8", 1, "00" * 32, "00" * 32, bytes(16), masks)
    payload, count = form.encode(head, step, grid)
    writer, found = form.write(head, grid), []
    for _ in range(0, grid.size, 20_000):
        found += writer.add(step[writer.places()])
    found += writer.finish()
    assert (writer.payload(), writer.count) == (payload, count)
    moved = np.zeros(grid.size, np.int64)
    for positions, change, steps in found:
        np.testing.assert_array_equal(change, step[positions])
        moved[positions] += steps
    for positions, steps in form.decode(dataclasses.replace(head, survivors=count), payload, grid):
        moved[positions] -= steps
    assert not moved.any()


def test_a_model_of_an_older_version_is_no_more(tmp_path):
    store = VersionStore(tmp_path)
    first = grow(store, store.start(base_model()), range(1, 2))
    assert isinstance(first.delta, TiledVector)
    some = np.array([3, 700, 5100])
    np.testing.assert_array_equal(first.delta.take(some), first.delta[:][some])
    grow(store, first, range(2, 3))
    with pytest.raises(StateError, match="is no more"):
        first.delta[:10]
    with pytest.raises(StateError, match="resume both"):
        store.advance(first, *round_of(first, 3))
    with pytest.raises(StateError, match="only the newest"):
        store.broadcast(first, "")


def test_a_store_is_taken_up_where_it_was(tmp_path):
    base = base_model()
    one, two = VersionStore(tmp_path / "one"), VersionStore(tmp_path / "two")
    ended = grow(one, one.start(base), range(1, 7))
    model = grow(two, two.start(base), range(1, 4))
    kept = two.state_arrays()
    two.close()
    again = VersionStore(tmp_path / "two")
    model = again.restore(base, kept)
    model = grow(again, model, range(4, 7))
    assert model.ref == ended.ref and again.fingerprint() == one.fingerprint()
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_a_round_that_the_run_did_not_keep_is_done_again(tmp_path):
    base = base_model()
    store = VersionStore(tmp_path / "a")
    model = grow(store, store.start(base), range(1, 3))
    kept, before = store.state_arrays(), files_of(tmp_path / "a")
    model = grow(store, model, range(3, 4))
    after = files_of(tmp_path / "a")
    store.close()
    again = VersionStore(tmp_path / "a")
    back = again.restore(base, kept)
    assert files_of(tmp_path / "a") == before
    assert grow(again, back, range(3, 4)).ref == model.ref
    assert files_of(tmp_path / "a") == after
    # Two rounds behind is another run's state.
    ahead = grow(again, again.model, range(4, 5))
    again.close()
    with pytest.raises(StateError, match="is asked for"):
        VersionStore(tmp_path / "a").restore(base, kept)
    assert (
        VersionStore(tmp_path / "a")
        .restore(base, {"version": np.frombuffer(bytes.fromhex(ahead.ref.version), np.uint8)})
        .ref
        == ahead.ref
    )


def test_a_run_killed_in_its_first_round_starts_anew(tmp_path):
    base = base_model()
    store = VersionStore(tmp_path)
    first = grow(store, store.start(base), range(1, 2))
    store.close()
    again = VersionStore(tmp_path)
    assert grow(again, again.start(base), range(1, 2)).ref == first.ref
    grow(again, again.model, range(2, 3))
    again.close()
    with pytest.raises(StateError, match="after 2 rounds"):
        VersionStore(tmp_path).start(base)


@pytest.mark.parametrize("tile", [1000, 1 << 12, 1 << 20])
def test_bits_do_not_depend_on_how_the_step_comes(tmp_path, tile, monkeypatch):
    base = base_model(60_000)
    one, two = (
        VersionStore(tmp_path / "one", "union-b1"),
        VersionStore(tmp_path / "two", "union-b1"),
    )
    model = grow(one, one.start(base), range(1, 4), off=True)

    class Cut:
        def __init__(self, step):
            self.step = step

        def tiles(self):
            for lo in range(0, self.step.size, tile):
                yield lo, self.step[lo : lo + tile]

    monkeypatch.setattr(disk_state, "_BATCH", 777)
    other = two.start(base)
    for number in range(1, 4):
        step, head, plans = round_of(other, number, off=True)
        other = two.advance_streamed(other, Cut(step), head, plans)
    assert other.ref == model.ref
    one.close(), two.close()
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_counts_widen_and_come_back(tmp_path):
    base = base_model()
    store, plain = VersionStore(tmp_path, "lossless"), VersionDownlink("lossless")
    model, other = store.start(base), plain.start(base)
    for number in range(1, 5):
        words = in_whole_steps(store, *round_of(model, number, size=0.5 if number % 2 else 1e-3))
        model, other = store.advance(model, *words), plain.advance(other, *words)
    assert store._files().counts.widened
    np.testing.assert_array_equal(store._files().counts[:], plain._groups()[0].counts)
    kept = store.state_arrays()
    counts = store._files().counts[:]
    store.advance(model, *round_of(model, 5, size=0.3))
    store.close()
    again = VersionStore(tmp_path, "lossless")
    again.restore(base, kept)
    np.testing.assert_array_equal(again._files().counts[:], counts)


def test_beyond_int32_is_an_error_and_nothing_moved(tmp_path):
    store = VersionStore(tmp_path, "lossless")
    model = grow(store, store.start(base_model()), range(1, 2))
    before = files_of(tmp_path)
    with pytest.raises(StateError, match="grid steps from the base"):
        store.advance(model, *round_of(model, 2, size=1e6))
    assert files_of(tmp_path) == before
    grow(store, store.model, range(2, 3))


@pytest.mark.parametrize("form", ["auto", "union-i8", "lossless", "dense-b1"])
def test_a_step_that_is_no_number_leaves_the_store(tmp_path, form, monkeypatch):
    monkeypatch.setattr(disk_state, "_BATCH", 500)
    base = base_model(60_000)
    store, plain = VersionStore(tmp_path / "a", form), VersionStore(tmp_path / "b", form)
    model, other = (grow(s, s.start(base), range(1, 3)) for s in (store, plain))
    before = files_of(tmp_path / "a")
    step, head, plans = round_of(model, 3)
    broken = step.copy()
    broken[np.flatnonzero(step)[-3]] = np.nan
    with pytest.raises(NonFiniteError):
        store.advance(model, broken, head, plans)
    assert files_of(tmp_path / "a") == before and store.model.ref == model.ref
    assert store.advance(store.model, step, head, plans).ref == (
        plain.advance(other, step, head, plans).ref
    )
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_auto_goes_over_to_dense_where_the_step_leaves_the_masks(tmp_path, monkeypatch):
    monkeypatch.setattr(disk_state, "_BATCH", 500)
    base = base_model(60_000)
    auto, dense = VersionStore(tmp_path / "a", "auto"), VersionStore(tmp_path / "b", "dense-b1")
    model, other = auto.start(base), dense.start(base)
    words = round_of(model, 1)
    words[0][-5:] += np.float32(0.01)
    assert auto.advance(model, *words).ref == dense.advance(other, *words).ref
    assert auto.steps[0].head.form == "dense"
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_another_base_is_refused_and_nothing_changed(tmp_path):
    store = VersionStore(tmp_path)
    grow(store, store.start(base_model()), range(1, 3))
    kept, before = store.state_arrays(), files_of(tmp_path)
    store.close()
    for open_it in (
        lambda s: s.start(base_model(seed=2)),
        lambda s: s.restore(base_model(seed=2), kept),
    ):
        with pytest.raises(StateError, match="is of base"):
            open_it(VersionStore(tmp_path))
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("name", ["store.state", "counts", "counts.high", "rest"])
@pytest.mark.parametrize("what", ["cut", "foreign", "gone"])
def test_a_file_that_is_not_whole_is_told_and_left(tmp_path, name, what):
    base = base_model()
    store = VersionStore(tmp_path)
    grow(store, store.start(base), range(1, 3))
    kept = store.state_arrays()
    store.close()
    path = tmp_path / name
    data = path.read_bytes()
    if what == "gone":
        path.unlink()
    else:
        path.write_bytes(data[:-9] if what == "cut" else b"foreign " + data[8:])
    before = files_of(tmp_path)
    for open_it in (lambda s: s.restore(base, kept), lambda s: s.start(base)):
        with pytest.raises(StateError):
            open_it(VersionStore(tmp_path))
    assert files_of(tmp_path) == before
    path.write_bytes(data)
    VersionStore(tmp_path).restore(base, kept)


def test_a_damaged_step_or_undo_file_is_told(tmp_path):
    base = base_model()
    store = VersionStore(tmp_path)
    model = grow(store, store.start(base), range(1, 3))
    kept = store.state_arrays()
    store.advance(model, *round_of(model, 3))
    store.close()
    undo = (tmp_path / "undo").read_bytes()
    (tmp_path / "undo").write_bytes(b"foreign " + undo[8:])
    with pytest.raises(StateError, match="no undo file"):
        VersionStore(tmp_path).restore(base, kept)
    (tmp_path / "undo").write_bytes(undo)
    step = tmp_path / "steps" / "00000003.step"
    whole = step.read_bytes()
    step.write_bytes(whole[:-1])
    with pytest.raises(StateError, match="cannot be read"):
        VersionStore(tmp_path).restore(base, store.state_arrays() if store.version else kept)


def test_a_base_that_is_no_number_somewhere_is_refused(tmp_path):
    for bad in (np.nan, np.inf, -np.inf):
        base = base_model()
        base.delta[4000] = bad
        with pytest.raises(NonFiniteError, match="in the base"):
            VersionStore(tmp_path).start(base)
    assert not (tmp_path / "store.state").exists()


def test_old_steps_go_and_who_stayed_away_gets_one_sum(tmp_path):
    base = base_model()
    store = VersionStore(tmp_path, keep_bytes=2500)
    model = grow(store, store.start(base), range(1, 13))
    kept = sorted(path.name for path in (tmp_path / "steps").iterdir())
    # Those of the round before stay until the next begins.
    assert 2 <= len(store.steps) <= 5 and len(kept) <= len(store.steps) + 2
    for have in ("", base.ref.version, "ab" * 32):
        (step,) = read_steps(
            store.broadcast(model, have).payloads[STEPS],
            store.broadcast(model, have).payloads["dense-steps"],
        )
        assert step.head.form == "lossless" and step.head.parent == base.ref.version
        counts, dense = np.zeros(base.delta.size, np.int32), np.zeros(base.dense.size, np.int32)
        apply_step(step, store._settled_grid(), counts, store._dense_group().grid, dense)
        np.testing.assert_array_equal(counts, store._files().counts[:])
    assert len(list(tmp_path.glob("sum-*.step"))) == 1
    grow(store, model, range(13, 14))
    assert not list(tmp_path.glob("sum-*.step"))


def test_facts_name_the_base_and_now_and_then_all_values(tmp_path):
    base = base_model()
    store = VersionStore(tmp_path, base_name="owner/name", verify_every=2)
    model = store.start(base)
    named = {"base-version": base.ref.version, "base-name": "owner/name"}
    assert store.facts() == named
    model = grow(store, model, range(1, 2))
    assert store.facts() == named
    model = grow(store, model, range(2, 3))
    whole = base.placed(model.delta[:], model.dense)
    assert store.facts() == {**named, "verify": whole.ref.version}
    assert abs(store.base_norm - np.linalg.norm(base.delta.astype(np.float64))) < 1e-6


def test_two_processes_do_not_write_one_store(tmp_path):
    store = VersionStore(tmp_path)
    store.start(base_model())
    child = os.fork()
    if not child:
        try:
            VersionStore(tmp_path).start(base_model())
        except StateError as error:
            os._exit(7 if "another run is at work" in str(error) else 1)
        os._exit(0)
    assert os.WEXITSTATUS(os.waitpid(child, 0)[1]) == 7
    grow(store, store.model, range(1, 2))


@pytest.mark.parametrize(
    "words",
    [
        {"form": "unin-b1"},
        {"dense_values": "b9"},
        {"drop_rate": "2"},
        {"keep_bytes": -1},
        {"verify_every": True},
        {"base_name": "x" * 300},
    ],
)
def test_settings_out_of_bounds_are_refused(tmp_path, words):
    with pytest.raises(ConfigError):
        VersionStore(tmp_path, **words)


def test_pieces_must_be_the_whole_vector():
    ones = np.ones(10, np.float32)
    pieces = [(0, ones), (10, ones[:7]), (17, ones[:3])]
    cut = [(lo, piece.copy()) for lo, piece in retiled(iter(pieces), 20, 8)]
    assert [(lo, piece.size) for lo, piece in cut] == [(0, 8), (8, 8), (16, 4)]
    for wrong in ([(0, ones)], [(0, ones), (11, ones)], [(0, ones), (10, ones), (20, ones)]):
        with pytest.raises(Exception, match=r"elements|begins"):
            list(retiled(iter(wrong), 20, 8))


def test_a_store_of_another_form_is_refused_and_left(tmp_path, monkeypatch):
    base = base_model()
    store = VersionStore(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(header, "_FORMAT", 1)
        grow(store, store.start(base), range(1, 3))
        kept = store.state_arrays()
        store.close()
    before = files_of(tmp_path)
    for open_it in (lambda s: s.restore(base, kept), lambda s: s.start(base)):
        with pytest.raises(
            StateError, match="store of format 1, 2 is known: run the dare-agg that"
        ):
            open_it(VersionStore(tmp_path))
    assert files_of(tmp_path) == before

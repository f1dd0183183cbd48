"""A run whose base lies on disk: no whole model is made, sent or kept, the bits are the same."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array
from flwr.serverapp.strategy import FedYogi

from dare_agg.checkpoint import fingerprints, open_checkpoint, write_checkpoint
from dare_agg.checkpoint.model import model_in
from dare_agg.downlink.ways import make_downlink
from dare_agg.errors import ConfigError, StateError
from dare_agg.flower import DareStrategy, dare, offer_base, reception
from dare_agg.flower.resume import keep_base, resume, save
from dare_agg.rounds.state import StateFolder

SET = {
    "min_available_nodes": 3,
    "min_train_nodes": 2,
    "fraction_evaluate": 0.0,
    "seed": 3,
    "dense": ["^head"],
    "server_step": "momentum",
}


@pytest.fixture(autouse=True)
def base(toys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The toy model as a checkpoint, with caches of its own."""
    monkeypatch.setenv("DARE_AGG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(reception, "_OFFERS", [])
    write_checkpoint(tmp_path / "base", toys.arrays())
    return tmp_path / "base"


def nodes(base: Path):
    """Node configs that name the base."""
    return lambda partition: {"partition-id": partition, "num-partitions": 3, "base": str(base)}


def strategy_on(base: Path, state: Path, **words: object) -> DareStrategy:
    return DareStrategy(**{**SET, "base": base, "state": state, **words})


def test_three_rounds_are_seen_alike_by_all_and_sent_in_steps_alone(
    memory_grid, toys, base, tmp_path
):
    """Each client compares every version by its values; `save_model` writes the very same."""
    seen = []
    strategy = strategy_on(
        base,
        tmp_path / "state",
        verify_every=1,
        fraction_evaluate=1.0,
        round_hook=lambda outcome: seen.append(outcome) and None,
    )
    grid = memory_grid(toys.app(), 3, node_config=nodes(base))
    result = strategy.start(grid, num_rounds=3)
    assert [outcome.measurements["rejected"] for outcome in seen] == [[], [], []]
    assert [outcome.measurements["evaluate_failed"] for outcome in seen] == [[], [], []]
    assert not any(len(m.content.get("arrays", ())) for m in grid.sent)
    assert max(seen[-1].measurements["download_bytes"]) < 4_000
    assert list(result.arrays) == sorted(toys.arrays())
    start, sums = toys.arrays(), 0.0
    for name, array in result.arrays.items():
        sums += float(array.numpy().sum())
        assert np.array_equal(array.numpy(), start[name]) == (name in seen[-1].model.local)
        assert np.abs(array.numpy() - start[name]).max() < 0.5 or array.dtype == "int64"
    assert seen[-1].client_metrics["sum"] == pytest.approx(sums)
    written = strategy.save_model(tmp_path / "out")
    found = model_in(open_checkpoint(written), dense=SET["dense"])
    assert found.fingerprints.version == strategy.fingerprint()


def run_on(grid, base: Path, folder: Path, *, rounds: int = 5, stop_after: int | None = None):
    """Begin or go on with a run in ``folder``; returns its last version."""
    kept = StateFolder(folder)
    strategy = strategy_on(
        base,
        folder,
        fraction_train=0.7,
        round_hook=lambda o: bool(save(strategy, kept, o)) or o.round == stop_after,
    )
    resumed = resume(strategy, kept)
    if resumed is None:
        keep_base(kept, strategy)
        strategy.start(grid, num_rounds=rounds)
    elif resumed.round < rounds:
        strategy.start(
            grid,
            resumed.arrays,
            num_rounds=rounds,
            start_round=resumed.round + 1,
            step_state=resumed.step_state,
        )
    else:
        return resumed.version
    strategy.downlink.close()
    kept.release()
    return strategy.outcome.model.ref.version


def test_stopping_and_going_on_changes_nothing(memory_grid, toys, base, tmp_path):
    whole = run_on(memory_grid(toys.app(), 3, node_config=nodes(base)), base, tmp_path / "a")
    for stop in (1, 3, None):
        grid = memory_grid(toys.app(), 3, shuffle=7, node_config=nodes(base))
        last = run_on(grid, base, tmp_path / "b", stop_after=stop)
    assert last == whole
    kept = sum(p.stat().st_size for p in (tmp_path / "b").glob("*.state"))
    assert kept < 20_000  # no model, no base


def test_kill_9_in_the_middle_costs_the_open_round_at_most(memory_grid, toys, base, tmp_path):
    whole = run_on(memory_grid(toys.app(), 3, node_config=nodes(base)), base, tmp_path / "calm")
    for delay in (0.2, 0.4, 0.6, 0.8):
        pid = os.fork()
        if pid == 0:
            try:
                run_on(memory_grid(toys.app(), 3, node_config=nodes(base)), base, tmp_path / "b")
            finally:
                os._exit(0)
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    grid = memory_grid(toys.app(), 3, node_config=nodes(base))
    assert run_on(grid, base, tmp_path / "b") == whole


def test_another_base_is_refused_on_resume(memory_grid, toys, base, tmp_path):
    grid = memory_grid(toys.app(), 3, node_config=nodes(base))
    run_on(grid, base, tmp_path / "a", stop_after=1)
    write_checkpoint(tmp_path / "other", toys.arrays(seed=1))
    with pytest.raises(StateError, match="was begun with base 'base', fingerprint"):
        run_on(grid, tmp_path / "other", tmp_path / "a")
    run_on(grid, base, tmp_path / "a", rounds=2)  # nothing was changed


def test_a_client_that_joins_late_gets_one_sum(memory_grid, toys, base, tmp_path):
    strategy = strategy_on(base, tmp_path / "state", min_available_nodes=2)
    grid = memory_grid(toys.app(), 3, node_config=nodes(base))
    late = max(grid.partitions, key=grid.partitions.__getitem__)
    grid.offline.add(late)
    strategy.start(grid, num_rounds=3)
    grid.offline.clear()
    before = len(grid.sent)
    strategy.start(grid, num_rounds=4, start_round=4)
    assert strategy.outcome.measurements["accepted"] == 3
    first = [m for m in grid.sent[before:] if m.metadata.dst_node_id == late][-1]
    assert [key for key in first.content if key.startswith("dare.down.")] == [
        "dare.down.steps",
        "dare.down.dense-steps",
    ]


def test_a_client_with_another_base_is_told_what_to_put_where(memory_grid, toys, base, tmp_path):
    write_checkpoint(tmp_path / "other", toys.arrays(seed=1))

    def configs(partition):
        where = tmp_path / ("other" if partition == 2 else "base")
        return {"partition-id": partition, "num-partitions": 3, "base": str(where)}

    strategy = strategy_on(base, tmp_path / "state", min_available_nodes=2)
    strategy.start(memory_grid(toys.app(), 3, node_config=configs), num_rounds=1)
    (told,) = strategy.outcome.measurements["refused"]
    assert "base-missing" in told["detail"]
    assert "start the node with base=FOLDER in --node-config" in told["detail"]
    assert f"base={tmp_path / 'other'} has" in told["detail"]


def test_a_base_that_was_altered_unseen_is_caught_where_values_are_compared(
    memory_grid, toys, base, tmp_path, monkeypatch
):
    monkeypatch.setattr(fingerprints, "_SETTLED_SECONDS", -1.0)
    mine = tmp_path / "mine"
    write_checkpoint(mine, toys.arrays())
    grid = memory_grid(
        toys.app(),
        3,
        node_config=lambda partition: {
            "partition-id": partition,
            "num-partitions": 3,
            "base": str(mine if partition == 2 else base),
        },
    )
    strategy = strategy_on(base, tmp_path / "state", verify_every=2)
    strategy.start(grid, num_rounds=1)
    altered_unseen(mine)
    strategy.start(grid, num_rounds=2, start_round=2)
    assert strategy.outcome.measurements["rejected"] == []
    strategy.start(grid, num_rounds=3, start_round=3)
    (told,) = strategy.outcome.measurements["rejected"]
    assert (told["name"], told["reason"]) == ("2", "base")
    assert "of round 2 has fingerprint" in told["detail"]


def altered_unseen(folder: Path) -> None:
    """Change a value as a failing disk does: the file looks as it did."""
    checkpoint = open_checkpoint(folder)
    model = model_in(checkpoint, dense=SET["dense"])
    layout = model.groups.layout
    known = checkpoint.fingerprint(layout)
    at = checkpoint.tensors["encoder.weight"].start
    with (folder / "model.safetensors").open("r+b") as stream:
        stream.seek(at)
        stream.write(b"\x11")
    fingerprints.remember(checkpoint.files, layout.fingerprint, known)


def test_words_that_contradict_each_other_are_refused(toys, base, tmp_path):
    for words, told in (
        ({"base": base}, "without state"),
        ({"state": tmp_path}, "give base too"),
        ({"verify_every": 2}, "give base too"),
        ({"base": base, "state": tmp_path, "downlink": make_downlink()}, "only steps travel"),
        ({"base": base, "state": tmp_path, "verify_every": -1}, "at least 0"),
    ):
        with pytest.raises(ConfigError, match=told):
            DareStrategy(**words)
    with pytest.raises(ConfigError, match="nothing to begin with"):
        DareStrategy().start(None)
    with pytest.raises(ConfigError, match="leave them out"):
        strategy_on(base, tmp_path / "a").start(None, toys.record(toys.arrays()))
    with pytest.raises(ConfigError, match="has none on disk"):
        DareStrategy().save_model(tmp_path / "out")


def test_an_app_offers_the_base(memory_grid, toys, base, tmp_path):
    offer_base(lambda message, context: base)
    strategy = strategy_on(base, tmp_path / "state")
    strategy.start(memory_grid(toys.app(), 3), num_rounds=1)
    assert strategy.outcome.measurements["accepted"] == 3


class Halving(DareStrategy):
    """Looks at what clients trained, and halves what is merged of one tensor."""

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        before = self.broadcasting.arrays["encoder.bias"].numpy()
        for reply in replies:
            assert np.abs(reply.content["arrays"]["encoder.bias"].numpy() - before).max() < 0.5
        merged, metrics = super().aggregate_train(server_round, replies)
        moved = merged["encoder.bias"].numpy()
        merged["encoder.bias"] = Array(before + (moved - before) / 2)
        return merged, metrics


def test_an_override_may_look_at_arrays_and_change_them(memory_grid, toys, base, tmp_path):
    words = {**SET, "drop_rate": 0, "values": "f32", "verify_every": 1, "fraction_evaluate": 1.0}
    words["downlink"] = make_downlink("lossless")
    whole = DareStrategy(**words, base=base, state=tmp_path / "a")
    whole.start(memory_grid(toys.app(), 3, node_config=nodes(base)), num_rounds=1)
    half = Halving(**words, base=base, state=tmp_path / "b")
    grid = memory_grid(toys.app(), 3, node_config=nodes(base))
    half.start(grid, num_rounds=1)
    start = toys.arrays()["encoder.bias"]
    moved, halved = (s.broadcasting.arrays["encoder.bias"].numpy() - start for s in (whole, half))
    assert np.abs(moved).max() > 1e-3
    assert np.abs(halved - moved / 2).max() < 1e-5
    assert half.outcome.measurements["evaluate_failed"] == []
    other = half.broadcasting.arrays["encoder.weight"].numpy()
    assert np.array_equal(other, whole.broadcasting.arrays["encoder.weight"].numpy())
    half.start(grid, num_rounds=3, start_round=2)  # the server step's moments are as they were
    assert half.outcome.measurements["rejected"] == []


def test_a_strategy_of_flowers_own_aggregates_over_a_base_on_disk(
    memory_grid, toys, base, tmp_path
):
    strategy = dare(
        FedYogi(min_available_nodes=3, fraction_evaluate=0.0),
        base=base,
        state=tmp_path / "state",
        downlink=make_downlink("lossless"),
        drop_rate=0,
        values="f32",
        verify_every=1,
        exclude=["num_batches"],
        seed=3,
    )
    plain = dare(
        FedYogi(min_available_nodes=3, fraction_evaluate=0.0),
        drop_rate=0,
        values="f32",
        exclude=["num_batches"],
        seed=3,
    )
    grid = memory_grid(toys.app(), 3, node_config=nodes(base))
    result = strategy.start(grid, num_rounds=2)
    wanted = plain.start(memory_grid(toys.app(), 3), toys.record(toys.arrays()), num_rounds=2)
    assert strategy.outcome.measurements["rejected"] == []
    for name, array in wanted.arrays.items():
        assert np.abs(result.arrays[name].numpy() - array.numpy()).max() < 1e-5, name


def test_arrays_of_a_round_that_is_over_say_so(memory_grid, toys, base, tmp_path):
    seen = []
    strategy = strategy_on(base, tmp_path / "state")
    grid = memory_grid(toys.app(), 3, node_config=nodes(base))
    strategy.start(grid, num_rounds=2, evaluate_fn=lambda n, arrays: seen.append(arrays))
    assert seen[2]["encoder.bias"].numpy().shape == (25,)
    assert "data" not in repr(seen[2])
    with pytest.raises(StateError, match="is no more"):
        seen[1]["encoder.bias"].numpy()


def test_a_tied_tensor_that_the_file_lacks_is_known_for_a_copy(memory_grid, toys, base, tmp_path):
    def tie(partition, tuned, metrics):
        tuned["tied.weight"] = tuned["encoder.weight"] + np.float32(partition == 2)

    strategy = strategy_on(base, tmp_path / "state")
    strategy.start(memory_grid(toys.app(edit=tie), 3, node_config=nodes(base)), num_rounds=1)
    assert strategy.outcome.measurements["accepted"] == 2
    (told,) = strategy.outcome.measurements["rejected"]
    assert told["reason"] == "layout" and "tied.weight" in told["detail"]

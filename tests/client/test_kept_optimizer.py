"""Moments kept between rounds: the same as one long round, of one run alone, safe under a kill."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

from client.batches import draw_batches
from client.config import configure, task_config
from client.kept_optimizer import KeptOptimizer
from client.learning import Lesson, learn
from client.training import build_task

torch = pytest.importorskip("torch")
RUN = ("run", "0", "dare")


@pytest.fixture
def task(tiny_model, review_files):
    return build_task(
        configure(
            model=str(tiny_model), data=str(review_files["csv"]), text_column="review",
            label_column="tone", length=12, steps=5, learning_rate=1e-3, weight_decay=0.01,
        )
    )  # fmt: skip


def kept(folder, number, **more):
    return KeptOptimizer(**{"folder": folder, "client": "0", "run": RUN, "round": number, **more})


def files(folder):
    return sorted(path.name.rpartition("-")[2] for path in folder.rglob("*.safetensors"))


def two_rounds(task, folder, rows, between=lambda state: state):
    first, _, _ = task.train(task.initial, rows, seed=[1], moments=kept(folder, 1))
    second, _, _ = task.train(between(first), rows, seed=[2], moments=kept(folder, 2))
    return second


def test_two_rounds_of_five_steps_are_one_of_ten(task, tmp_path):
    rows = np.arange(40)
    second = two_rounds(task, tmp_path, rows)
    batches = [at for seed in ([1], [2]) for at in draw_batches(rows, task.config, seed)]
    assert len(batches) == 10
    named = task._place(task.initial)
    task._load().eval()
    lesson = Lesson(
        task.config, task.compute, task._load(), named,
        read=lambda at: task._read("train", at), loss=task._loss,
    )  # fmt: skip
    learn(lesson, batches)
    whole = {name: p.detach().numpy().copy() for name, p in named.items()}
    assert all(np.array_equal(second[name], whole[name]) for name in whole)
    anew, _, _ = task.train(
        task.train(task.initial, rows, seed=[1])[0], rows, seed=[2]
    )  # fmt: skip
    assert any(not np.array_equal(anew[name], whole[name]) for name in whole)


def test_moments_stay_when_the_server_moves_the_weights(task, tmp_path):
    rows = np.arange(40)

    def merged(state):
        return {name: array + np.float32(0.01) for name, array in state.items()}

    moved = two_rounds(task, tmp_path, rows, merged)
    first, _, _ = task.train(task.initial, rows, seed=[1])
    anew, _, _ = task.train(merged(first), rows, seed=[2])
    assert any(not np.array_equal(anew[name], moved[name]) for name in anew)


def test_a_round_that_is_trained_again_begins_as_it_did(task, tmp_path):
    rows = np.arange(40)
    first, _, _ = task.train(task.initial, rows, seed=[1], moments=kept(tmp_path, 1))
    once, _, _ = task.train(first, rows, seed=[2], moments=kept(tmp_path, 2))
    again, _, _ = task.train(first, rows, seed=[2], moments=kept(tmp_path, 2))
    assert all(np.array_equal(once[name], again[name]) for name in once)


def test_two_rounds_are_kept_and_what_another_start_left_goes(task, tmp_path):
    rows = np.arange(20)
    for number in (1, 2, 3, 5):
        task.train(task.initial, rows, seed=[number], moments=kept(tmp_path, number))
    assert files(tmp_path) == ["3.safetensors", "5.safetensors"]
    task.train(task.initial, rows, seed=[4], moments=kept(tmp_path, 4))
    assert files(tmp_path) == ["3.safetensors", "4.safetensors"]
    for path in tmp_path.rglob("*"):
        assert path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    "other", [{"run": ("run", "0", "fedavg")}, {"run": ("run 2", "0", "dare")}, {"client": "1"}]
)
def test_another_run_method_or_client_has_moments_of_its_own(task, tmp_path, other):
    rows = np.arange(20)
    task.train(task.initial, rows, seed=[1], moments=kept(tmp_path, 1))
    fresh, _, _ = task.train(task.initial, rows, seed=[2])
    found, _, _ = task.train(task.initial, rows, seed=[2], moments=kept(tmp_path, 2, **other))
    assert all(np.array_equal(fresh[name], found[name]) for name in fresh)


def test_another_models_parameters_have_moments_of_their_own(task, tmp_path):
    rows = np.arange(20)
    task.train(task.initial, rows, seed=[1], moments=kept(tmp_path, 1))
    head = build_task(replace(task.config, train="head"))
    fresh, _, _ = head.train(head.initial, rows, seed=[2])
    found, _, _ = head.train(head.initial, rows, seed=[2], moments=kept(tmp_path, 2))
    assert all(np.array_equal(fresh[name], found[name]) for name in fresh)


def damaged(path, how):
    from safetensors.numpy import load_file, save_file

    if how == "cut off":
        path.write_bytes(path.read_bytes()[:-100])
        return
    found = load_file(path)
    name = next(key for key in found if key.startswith("v.") and found[key].ndim == 2)
    if how == "negative":
        found[name] = found[name] - 1
    elif how == "not finite":
        found[name][0, 0] = np.nan
    elif how == "shape":
        found[name] = found[name].ravel()
    elif how == "half":
        del found[name]
    elif how == "step":
        found["step"] = np.float32([0])
    else:
        found["m.another"] = np.zeros(3, np.float32)
    save_file(found, path)


@pytest.mark.parametrize(
    "how", ["cut off", "negative", "not finite", "shape", "half", "step", "another"]
)
def test_what_is_damaged_costs_the_moments_not_the_round(task, tmp_path, how, caplog):
    rows = np.arange(20)
    task.train(task.initial, rows, seed=[1], moments=kept(tmp_path, 1))
    damaged(next(tmp_path.rglob("*-1.safetensors")), how)
    fresh, _, _ = task.train(task.initial, rows, seed=[2])
    with caplog.at_level("WARNING", logger="flwr"):
        found, _, _ = task.train(task.initial, rows, seed=[2], moments=kept(tmp_path, 2))
    assert "they begin anew" in caplog.text
    assert all(np.array_equal(fresh[name], found[name]) for name in fresh)
    assert files(tmp_path) == ["2.safetensors"]


def test_a_folder_that_cannot_be_written_costs_the_moments_not_the_round(task, tmp_path, caplog):
    (tmp_path / "taken").write_text("a file")
    with caplog.at_level("WARNING", logger="flwr"):
        task.train(task.initial, np.arange(20), seed=[1], moments=kept(tmp_path / "taken", 1))
    assert "are not kept" in caplog.text


def test_the_folder_is_bounded_and_the_newest_stays(task, tmp_path):
    rows = np.arange(20)
    task.train(task.initial, rows, seed=[1], moments=kept(tmp_path, 1))
    size = next(tmp_path.rglob("*.safetensors")).stat().st_size
    for client in "123":
        last = kept(tmp_path, 1, client=client, keep_bytes=2.5 * size)
        task.train(task.initial, rows, seed=[1], moments=last)
        time.sleep(0.01)
    left = [*tmp_path.rglob("*.safetensors")]
    assert len(left) == 2
    assert any(last._files(task._place(task.initial)))


KILLED = """
import sys
import numpy as np
import torch
from pathlib import Path
from client.kept_optimizer import KeptOptimizer

named = {"w": torch.nn.Parameter(torch.zeros(1 << 18))}
optimizer = torch.optim.AdamW([*named.values()], fused=True)
print("ready", flush=True)
for number in range(1, 10_000):
    kept = KeptOptimizer(Path(sys.argv[1]), "0", ("run",), number)
    assert number == 1 or kept.load(optimizer, named)
    named["w"].grad = torch.full((1 << 18,), float(number))
    optimizer.step()
    kept.save(optimizer, named)
"""


def test_a_kill_at_any_moment_leaves_whole_files(tmp_path):
    for delay in (0.05, 0.11, 0.23):
        folder = tmp_path / str(delay)
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(folder)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "ready\n"
        while not files(folder):
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        named = {"w": torch.nn.Parameter(torch.zeros(1 << 18))}
        optimizer = torch.optim.AdamW([*named.values()], fused=True)
        after = KeptOptimizer(folder, "0", ("run",), 1 << 30)
        newest = max(number for number, _ in after._files(named))
        assert after.load(optimizer, named)
        state = optimizer.state[named["w"]]
        assert float(state["step"]) == newest
        moment = 0.0
        for number in range(1, newest + 1):
            moment += 0.1 * (number - moment)
        assert float(state["exp_avg"][0]) == pytest.approx(moment, rel=1e-4)


def test_the_nodes_word_wins():
    assert not task_config({"keep-optimizer": True}, {"keep-optimizer": False}).keep_optimizer

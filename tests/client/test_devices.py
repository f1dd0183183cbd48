"""Devices: the words, what is missing here, and what a GPU keeps of a CPU's promises."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest
from plain_loop import lesson

from client.config import DEFAULTS, configure, task_config
from client.devices import Compute, compute_of
from client.learning import learn
from client.training import build_task
from dare_agg.cli.gpus import check_gpus
from dare_agg.deploy import devices
from dare_agg.errors import ConfigError

torch = pytest.importorskip("torch")
ROWS = [np.arange(2)] * 3
HAS_GPU = torch.cuda.is_available()
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_GPU, reason="torch sees no GPU here"),
]
without_gpu = pytest.mark.skipif(HAS_GPU, reason="there is a GPU here")


def config(model, files, **more):
    words = {"text_column": "review", "label_column": "tone", "length": 12, "steps": 6}
    return configure(**{"model": str(model), "data": str(files["csv"]), **words, **more})


def test_statistics_are_refused_where_there_is_no_float64(tiny_model, review_files):
    task = build_task(config(tiny_model, review_files))
    task.__dict__["compute"] = Compute("mps")
    with pytest.raises(ConfigError, match="summed in float64, which device 'mps' has not"):
        task.statistics("gram", {}, np.arange(4), examples=4)


def test_the_doctor_shows_devices_and_a_gpu_that_is_not_seen(monkeypatch):
    from dare_agg.cli.doctor import _devices

    ((name, ok, found, _),) = _devices()
    assert name == "devices" and "cpu" in found and (ok or torch.version.cuda)
    made_for_cuda = devices.Build("2.9", "12.8", "", "")
    monkeypatch.setattr(devices, "torch_build", lambda: made_for_cuda)
    monkeypatch.setattr(devices, "devices_here", lambda: ["cpu (1 threads)"])
    ((_, ok, found, remedy),) = _devices()
    assert not ok and "torch is built for CUDA 12.8" in found and "CUDA_VISIBLE_DEVICES" in remedy
    monkeypatch.setattr(devices, "devices_here", lambda: ["cuda:0 (A, 80 GB)", "cpu (1 threads)"])
    assert _devices()[0][1]
    monkeypatch.setattr(devices, "torch_build", lambda: None)
    assert _devices() == [("devices", False, "torch is not installed", "see above")]


def test_words_of_devices():
    assert devices.parse_device("cuda:1") == ("cuda", 1)
    assert devices.parse_device("auto") == ("auto", None)
    for word in ("meta", "cuda:", "cuda:-1", "cpu:0", "", "cuda:1234"):
        with pytest.raises(ConfigError, match=r"is unknown; (known: auto, cpu|did you mean)"):
            devices.parse_device(word)
    with pytest.raises(ConfigError, match="did you mean 'cuda'"):
        devices.parse_device("GPU")


def test_the_cpu_is_always_there():
    assert devices.find_device("cpu") == "cpu"
    assert devices.devices_here()[-1].startswith("cpu")
    if len(devices.devices_here()) == 1:
        assert devices.find_device("auto") == "cpu"


@without_gpu
def test_a_missing_device_is_said_before_anything_is_read(tiny_model):
    began = time.monotonic()
    with pytest.raises(ConfigError, match=r"device 'cuda:2' is not here: .*; here: .*cpu; .*auto"):
        build_task(config(tiny_model, {"csv": "nowhere.csv"}, device="cuda:2"))
    assert time.monotonic() - began < 1


def a_build_of_torch(folder, cuda):
    """A folder that looks like a torch package which would take for ever to load."""
    package = folder / "torch"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('torch was loaded')\n")
    (package / "version.py").write_text(f"__version__ = '2.9'\ncuda = {cuda!r}\nhip = xpu = None\n")
    return folder


@without_gpu
@pytest.mark.parametrize(
    ("cuda", "word", "why"),
    [
        (
            "12.8",
            "cuda",
            "torch is a build with it, but sees no GPU; here: cpu; look at the driver",
        ),
        (None, "cuda", "torch 2.9 is a build without it; here: cpu; install another build"),
        (None, "xpu:1", "torch 2.9 is a build without it"),
    ],
)
def test_what_is_missing_is_told_without_loading_torch(tmp_path, cuda, word, why):
    code = (
        f"import sys; sys.path.insert(0, {str(a_build_of_torch(tmp_path, cuda))!r})\n"
        "from dare_agg.deploy.devices import check_device\n"
        "from dare_agg.errors import ConfigError\n"
        f"try: check_device({word!r})\n"
        "except ConfigError as error: print(error)\n"
        "check_device('auto'); check_device('cpu')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert why in done.stdout and not done.stderr


def test_a_machines_number_of_gpus_bounds_the_word(monkeypatch):
    monkeypatch.setattr(devices, "seen_by_driver", lambda kind: 2 if kind == "cuda" else 0)
    devices.check_device("cuda:1")
    with pytest.raises(
        ConfigError, match="'cuda:2' is not here: there are 2 of them; here: cuda:0"
    ):
        devices.check_device("cuda:2")


def test_the_nodes_word_wins():
    run = {**DEFAULTS, "device": "cuda", "threads": 4}
    node = {"device": "cpu", "precision": "auto"}
    settled = task_config(run, node)
    assert (settled.device, settled.threads, settled.precision) == ("cpu", 4, "auto")
    assert compute_of(settled) == Compute("cpu", 4, "float32")
    with pytest.raises(ConfigError, match="device 'meta' is unknown"):
        task_config(run, {"device": "meta"})
    with pytest.raises(ConfigError, match="threads = 0; 1 to 1024 are possible"):
        task_config(run, {"threads": 0})
    with pytest.raises(ConfigError, match="threads = 'four'; a whole number is needed"):
        task_config(run, {"threads": "four"})


def test_a_clients_share_of_a_gpu(monkeypatch):
    monkeypatch.setattr("dare_agg.cli.gpus.seen_by_driver", lambda kind: 2)
    monkeypatch.setattr("dare_agg.cli.gpus.check_device", lambda word: None)
    check_gpus(0.5, "auto")
    check_gpus(2, "cuda")
    for gpus, device, why in [
        (1.5, "auto", "a share up to 1"),
        (float("nan"), "auto", "a share up to 1"),
        (-1, "auto", "a share up to 1"),
        (3, "auto", "2 are here"),
        (0, "cuda", "without --gpus: a simulated client sees no GPU"),
        (0.5, "cuda:1", "CUDA_VISIBLE_DEVICES"),
        (0.5, "cpu", "which takes none"),
    ]:
        with pytest.raises(ConfigError, match=why):
            check_gpus(gpus, device)
    check_gpus(0, "whatever another app calls it")


@without_gpu
def test_a_share_of_no_gpu():
    with pytest.raises(ConfigError, match=r"--gpus 0\.5 without a GPU: device 'cuda' is not here"):
        check_gpus(0.5, "auto")


def test_no_step_is_lost_to_the_scale_of_float16():
    weight = torch.nn.Parameter(torch.ones(3))
    rate = 0.01

    def loss(read):  # its gradient, 1000 times the scale in float16, overflows beyond a scale of 65
        return (weight.half() * 1000).float().sum()

    config = configure(learning_rate=rate)
    assert len(learn(lesson({"w": weight}, loss, config, Compute("cpu", 1, "float16")), ROWS)) == 3
    assert torch.allclose(weight, torch.full((3,), 1 - 3 * rate), atol=1e-5)


def test_float16_trains_like_the_others(tiny_model, review_files):
    found = {}
    for precision in ("float32", "bfloat16", "float16"):
        task = build_task(config(tiny_model, review_files, precision=precision))
        start = task.initial_state()
        found[precision], _, _ = task.train(start, np.arange(64), seed=[0])
        assert all(array.dtype == np.float32 for array in found[precision].values())
    change = {p: moved(state, start) for p, state in found.items()}
    for precision in ("bfloat16", "float16"):
        gap = np.linalg.norm(change[precision] - change["float32"])
        assert 0 < gap < 0.5 * np.linalg.norm(change["float32"])


def moved(state, start):
    return np.concatenate([(state[name] - start[name]).ravel() for name in sorted(start)])


def test_more_threads_change_the_bits_only_as_far_as_sums_do(tiny_model, review_files):
    one = build_task(config(tiny_model, review_files))
    two = build_task(config(tiny_model, review_files, threads=2))
    start = one.initial_state()
    first = two.train(start, np.arange(64), seed=[0])[0]
    assert torch.get_num_threads() == 2
    again = two.train(start, np.arange(64), seed=[0])[0]
    single = one.train(start, np.arange(64), seed=[0])[0]
    assert torch.get_num_threads() == 1
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert np.allclose(moved(first, start), moved(single, start), atol=1e-5)


@pytest.mark.parametrize("precision", ["float32", "auto", "float16"])
@pytest.mark.parametrize("where", [pytest.param("cuda", marks=on_gpu)])
def test_on_a_gpu_training_repeats_and_is_near_the_cpus(tiny_model, review_files, where, precision):
    task = build_task(config(tiny_model, review_files, device=where, precision=precision))
    start = task.initial_state()
    assert {p.device.type for p in task._load().parameters()} == {where}
    rows = np.arange(64)
    first, _, _ = task.train(start, rows, seed=[0])
    again, _, _ = build_task(task.config).train(start, rows, seed=[0])
    assert all(np.array_equal(first[name], again[name]) for name in first)
    here = build_task(config(tiny_model, review_files, device="cpu"))
    assert all(np.array_equal(here.initial[name], start[name]) for name in start)
    change, due = moved(first, start), moved(here.train(start, rows, seed=[0])[0], start)
    assert np.linalg.norm(change - due) < 0.5 * np.linalg.norm(due)
    assert task.evaluate(first)["loss"] == pytest.approx(here.evaluate(first)["loss"], rel=0.02)
    gram = task.statistics("gram", first, rows, examples=16)
    assert np.allclose(
        gram["head.weight"],
        here.statistics("gram", first, rows, examples=16)["head.weight"],
        atol=0.01,
    )


SHAPES = """
import torch
from client.devices import Compute

compute = Compute("cpu", 1, "bfloat16")
compute.begin()
weights = torch.nn.Parameter(torch.zeros(8192, 256))

def held():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

def step(rows):
    with compute.autocast():
        scores = torch.nn.functional.linear(torch.zeros(rows, 256), weights)
    scores.float().logsumexp(-1).mean().backward()
    weights.grad = None

for rows in (200, 201, 202):
    step(rows)
first = held()
for rows in range(20, 200):
    step(rows)
print(held() - first)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_batches_of_many_lengths_in_bfloat16_do_not_hold_more_and_more_memory():
    """What oneDNN keeps a shape of a product, beside a process that keeps it as oneDNN would."""

    def grown(**words):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **words}
        environment = {k: v for k, v in environment.items() if v}
        command = [sys.executable, "-c", SHAPES]
        return int(subprocess.run(command, env=environment, stdout=-1, check=True).stdout) >> 20

    word = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    as_it_would = grown(**{word: "1024"})
    if as_it_would < 200:
        pytest.skip("this processor's kernels keep little")
    assert grown(**{word: ""}) < as_it_would / 2

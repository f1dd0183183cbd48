"""Jobs in NVFlare's own simulator: recipe, controller and filter, training scripts untouched."""

import json
import subprocess
import sys

import numpy as np
import pytest
from made_sites import made
from made_sites import rounds as rounds_in_memory

pytest.importorskip("nvflare", reason="needs the extra nvflare: pip install 'dare-agg[nvflare]'")
pytestmark = pytest.mark.slow

# What a user's job.py and client.py are: NVFlare's Client API, and a recipe.
CLIENT = """
import numpy as np
import nvflare.client as flare

flare.init()
number = int(flare.get_site_name().rsplit("-", 1)[1])
while flare.is_running():
    model = flare.receive()
    weights = model.params["numpy_key"]
    rng = np.random.default_rng([number, model.current_round])
    tuned = weights + rng.normal(0.002, 0.004, weights.shape).astype(np.float32)
    BODY
    flare.send(flare.FLModel(params={"numpy_key": tuned}, metrics={"loss": 0.5}, meta=META))
"""
META = '{"NUM_STEPS_CURRENT_ROUND": 10 * number}'
JOB = """
import json, sys
import numpy as np
from nvflare.recipe import SimEnv
from dare_agg.nvflare import NumpyDareRecipe

words = json.loads(sys.argv[1])
sites = words.pop("sites", 3)
start = np.random.default_rng(0).normal(size=(30, 40)).astype(np.float32)
recipe = NumpyDareRecipe(
    name="job", model=start.tolist(), min_clients=words.pop("min_clients", sites),
    train_script="client.py", **words)
EDIT
recipe.execute(SimEnv(num_clients=sites, workspace_root=sys.argv[2]))
"""


def started(folder, **words):
    """Run a folder's job.py; returns the process, the server's run folder and the rounds' rows."""
    done = subprocess.run(
        [sys.executable, "job.py", json.dumps({"num_rounds": 2, "seed": 7, **words}), "sim"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=500,
    )
    run = folder / "sim" / "job" / "server" / "simulate_job"
    rows = run / "dare_rounds.jsonl"
    found = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
    return done, run, found


def simulate(folder, body="", meta=META, edit="", **words):
    """Run a job of a NumPy model; returns the process, the final model and the rounds' rows."""
    (folder / "client.py").write_text(CLIENT.replace("BODY", body).replace("META", meta))
    (folder / "job.py").write_text(JOB.replace("EDIT", edit))
    done, run, found = started(folder, **words)
    model = run / "models" / "server.npy"
    return done, np.load(model) if model.exists() else None, found


def in_memory(folder, sites=3, last=2, **words):
    """The same sites through the same rounds, without NVFlare."""

    def train(arrays, number, server_round):
        rng = np.random.default_rng([number, server_round - 1])
        weights = arrays["numpy_key"]
        return {"numpy_key": weights + rng.normal(0.002, 0.004, weights.shape).astype(np.float32)}

    start = {"numpy_key": np.random.default_rng(0).normal(size=(30, 40)).astype(np.float32)}
    run = made(sites, **words)
    return rounds_in_memory(run, folder, arrays=start, sites=sites, last=last, train=train)


@pytest.mark.parametrize(
    "words",
    [
        {"drop_rate": 0.9},
        {"drop_rate": 0.9, "downlink": "full", "server_step": "adam(tau=1e-3)"},
        {"params_transfer_type": "DIFF"},
        {"launch_external_process": True, "command": f"{sys.executable} -u", "drop_rate": 0.5},
    ],
)
def test_a_job_makes_the_bits_of_its_sites_without_nvflare(words, tmp_path):
    words = dict(words)
    done, model, rows = simulate(tmp_path, **words)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for word in ("params_transfer_type", "launch_external_process", "command"):
        words.pop(word, None)
    expected = in_memory(tmp_path / "memory", **words)
    assert model.tobytes() == expected[-1].arrays["numpy_key"].tobytes()
    assert [row["update_bytes"] for row in rows] == [
        one.measurements["update_bytes"] for one in expected
    ]
    assert [row["examples"] for row in rows] == [[10, 20, 30]] * 2


def test_who_gives_a_nan_is_left_out_and_the_round_goes_on(tmp_path):
    body = "tuned = tuned * (np.nan if number == 2 else 1)"
    done, model, rows = simulate(tmp_path, body, drop_rate=0.9)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert np.isfinite(model).all()
    assert [row["clients"] for row in rows] == [["site-1", "site-3"]] * 2
    assert [row["rejected"][0]["reason"] for row in rows] == ["non-finite"] * 2


def test_a_job_of_which_nothing_counts_fails(tmp_path):
    done, _, rows = simulate(tmp_path, "tuned = tuned * np.nan", drop_rate=0.9)
    assert done.returncode != 0
    assert "none of 2 rounds" in done.stdout + done.stderr
    assert [row["accepted"] for row in rows] == [0, 0]


def test_sites_without_the_filter_are_told_so_and_the_job_fails(tmp_path):
    edit = "recipe._add = lambda kind: None"
    done, _, _ = simulate(tmp_path, edit=edit, drop_rate=0.9)
    assert done.returncode != 0
    assert "no DareFilter" in done.stdout + done.stderr


def test_without_a_count_each_site_weighs_one(tmp_path):
    done, _, rows = simulate(tmp_path, meta="{}", drop_rate=0.9, num_rounds=1)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert rows[0]["examples"] == [1, 1, 1]
    assert "counts as 1" in done.stdout + done.stderr


def test_a_job_goes_on_where_another_one_stopped(tmp_path):
    words = {"drop_rate": 0.9, "server_step": "adam(tau=1e-3)"}
    state = str(tmp_path / "state")
    for last, resume in ((2, False), (3, True)):
        folder = tmp_path / str(last)
        folder.mkdir()
        done, model, rows = simulate(folder, num_rounds=last, state=state, resume=resume, **words)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert [row["round"] for row in rows] == [3]
    expected = in_memory(tmp_path / "memory", last=3, **words)
    assert model.tobytes() == expected[-1].arrays["numpy_key"].tobytes()


def test_a_job_stops_where_its_condition_is_met(tmp_path):
    done, _, rows = simulate(tmp_path, drop_rate=0.9, num_rounds=5, stop_cond="loss <= 0.6")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert len(rows) == 1


# The main process of the simulator is its server.
MEMORY = """
import json, resource, sys
import numpy as np
from nvflare.recipe import SimEnv
from dare_agg.nvflare import NumpyDareRecipe

sites = json.loads(sys.argv[1])["sites"]
recipe = NumpyDareRecipe(
    name="job", initial_ckpt=sys.argv[2] + ".npy", min_clients=sites, num_rounds=2,
    train_script="client.py", drop_rate=0.9, seed=0)
np.save(sys.argv[2] + ".npy", np.ones(6_000_000, np.float32))
recipe.execute(SimEnv(num_clients=sites, num_threads=2, workspace_root=sys.argv[2]))
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_the_server_holds_no_model_for_a_site(tmp_path):
    peaks = []
    for sites in (2, 5):
        folder = tmp_path / str(sites)
        folder.mkdir()
        (folder / "client.py").write_text(CLIENT.replace("BODY", "").replace("META", META))
        (folder / "job.py").write_text(MEMORY.replace("sys.argv[2]", repr(str(folder / "sim"))))
        done, _, rows = started(folder, sites=sites)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert [row["accepted"] for row in rows] == [sites, sites]
        peaks.append(1024 * int(done.stdout.rsplit("peak", 1)[1]))
    # Three more models would be 72 MB.
    assert peaks[1] - peaks[0] < 24e6, peaks


TORCH_NET = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(20, 64), nn.BatchNorm1d(64), nn.ReLU())
        self.head = nn.Linear(64, 2)

    def forward(self, x):
        return self.head(self.body(x))


def train(net, number, round_):
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(100 * number + round_)
    x = torch.randn(64, 20, generator=generator)
    loss = torch.nn.functional.cross_entropy(net.train()(x), (x.sum(1) > 0).long())
    grads = torch.autograd.grad(loss, list(net.parameters()))
    with torch.no_grad():
        for parameter, grad in zip(net.parameters(), grads, strict=True):
            parameter -= 0.1 * grad
"""
TORCH_CLIENT = """
import nvflare.client as flare
from net import Net, train

flare.init()
number = int(flare.get_site_name().rsplit("-", 1)[1])
net = Net()
while flare.is_running():
    model = flare.receive()
    net.load_state_dict(model.params)
    train(net, number, model.current_round)
    meta = {"NUM_STEPS_CURRENT_ROUND": 10 * number}
    flare.send(flare.FLModel(params=net.state_dict(), meta=meta))
"""
TORCH_JOB = """
import json, sys
from nvflare.recipe import SimEnv
from dare_agg.nvflare import DareRecipe
from net import Net

recipe = DareRecipe(
    name="job", model=Net(), min_clients=2, train_script="client.py", **json.loads(sys.argv[1]))
recipe.execute(SimEnv(num_clients=2, workspace_root=sys.argv[2]))
"""


def test_a_job_of_pytorch_makes_the_bits_of_its_sites_without_nvflare(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    for name, text in (("net", TORCH_NET), ("client", TORCH_CLIENT), ("job", TORCH_JOB)):
        (tmp_path / f"{name}.py").write_text(text)
    done, run, rows = started(tmp_path, dense=["^head"], num_rounds=3)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert [row["accepted"] for row in rows] == [2, 2, 2]
    scope = {}
    exec(compile(TORCH_NET, "net", "exec"), scope)
    net = scope["Net"]()
    start = {name: tensor.numpy().copy() for name, tensor in net.state_dict().items()}

    def train(arrays, number, server_round):
        net.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
        scope["train"](net, number, server_round - 1)
        return {name: tensor.numpy().copy() for name, tensor in net.state_dict().items()}

    expected = rounds_in_memory(
        made(2, dense=["^head"]), tmp_path / "memory", arrays=start, sites=2, last=3, train=train
    )
    (model,) = run.rglob("FL_global_model.pt")
    found = torch.load(model, weights_only=False)["model"]
    assert list(found) == list(start)
    for name, array in expected[-1].arrays.items():
        assert np.asarray(found[name]).tobytes() == array.tobytes(), name

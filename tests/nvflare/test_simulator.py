"""Jobs in NVFlare's own simulator: recipe, controller and filter, training scripts untouched."""

import json
import subprocess
import sys

import numpy as np
import pytest
from made_sites import rounds as rounds_in_memory

from dare_agg.nvflare.run import Run
from dare_agg.nvflare.words import read_words

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


def simulate(folder, body="", meta=META, edit="", **words):
    """Run a job of a NumPy model; returns the process, the final model and the rounds' rows."""
    (folder / "client.py").write_text(CLIENT.replace("BODY", body).replace("META", meta))
    (folder / "job.py").write_text(JOB.replace("EDIT", edit))
    done = subprocess.run(
        [sys.executable, "job.py", json.dumps({"num_rounds": 2, "seed": 7, **words}), "sim"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    run = folder / "sim" / "job" / "server" / "simulate_job"
    rows = run / "dare_rounds.jsonl"
    found = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
    model = run / "models" / "server.npy"
    return done, np.load(model) if model.exists() else None, found


def in_memory(folder, sites=3, **words):
    """The same sites through the same rounds, without NVFlare."""

    def train(arrays, number, server_round):
        rng = np.random.default_rng([number, server_round - 1])
        weights = arrays["numpy_key"]
        return {"numpy_key": weights + rng.normal(0.002, 0.004, weights.shape).astype(np.float32)}

    start = {"numpy_key": np.random.default_rng(0).normal(size=(30, 40)).astype(np.float32)}
    import logging

    run = Run(read_words({"seed": 7, **words}), sites, logging.getLogger("memory"))
    return rounds_in_memory(run, folder, arrays=start, sites=sites, train=train)


@pytest.mark.parametrize(
    "words",
    [
        {"drop_rate": 0.9},
        {"drop_rate": 0.9, "downlink": "full", "server_step": "adam(tau=1e-3)"},
        {"params_transfer_type": "DIFF"},
    ],
)
def test_a_job_makes_the_bits_of_its_sites_without_nvflare(words, tmp_path):
    done, model, rows = simulate(tmp_path, **words)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    words.pop("params_transfer_type", None)
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

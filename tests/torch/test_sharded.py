"""A model in pieces over processes (FSDP2) makes the update of the whole one, bit for bit."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from dare_agg.codec.update import encode_update
from dare_agg.torch.named import named_tensors
from dare_agg.vectors.model import global_model

RANKS = Path(__file__).with_name("sharded_ranks.py")
FEDERATED = Path(__file__).with_name("federated_ranks.py")


def the_script(path=RANKS):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("count", "dtype", "without"),
    [(2, "float32", ()), (2, "bfloat16", ()), (3, "float32", ("embed",))],
)
def test_the_payload_is_the_whole_models(tmp_path, count, dtype, without):
    script = the_script()
    words = [str(RANKS), str(count), str(tmp_path), dtype, *without]
    ranks = [
        subprocess.Popen([sys.executable, words[0], str(rank), *words[1:]], stderr=subprocess.PIPE)
        for rank in range(count)
    ]
    ends = [(rank.communicate(timeout=500)[1].decode(), rank.returncode) for rank in ranks]
    assert all(code == 0 for _, code in ends), ends
    base = {n: t.detach().numpy().copy() for n, t in named_tensors(script.the_model()).items()}
    version = global_model(base, by_form=True)
    trained = dict(np.load(tmp_path / "trained.npz"))
    if dtype == "bfloat16":
        import torch

        base = {n: torch.from_numpy(a).bfloat16().float().numpy() for n, a in base.items()}
    if without:
        trained["embed.weight"] = base["embed.weight"]
        trained["score.weight"] = base["score.weight"]
    begun = version.groups.layout.flatten(base)
    after = version.groups.layout.flatten(trained)
    assert np.count_nonzero(after != begun) > begun.size / 3
    for number, spec in enumerate(script.SPECS):
        right = encode_update(script.spec_of(version, *spec), (begun, after))
        assert (tmp_path / f"{number}.dare").read_bytes() == right, spec
    change = np.abs(after - begun)
    norm, largest, above = map(float, (tmp_path / "measured").read_text().split())
    assert norm == pytest.approx(float(np.linalg.norm(change.astype(np.float64))), rel=1e-6)
    assert (largest, above) == (change.max(), np.count_nonzero(change > np.float32(0.005)))
    for rank in range(count):
        assert "nan in tensor 'norm.weight'" in (tmp_path / f"refused-{rank}").read_text()


def test_a_client_of_two_processes_ends_where_one_of_one_does(tmp_path):
    script = the_script(FEDERATED)
    command = [sys.executable, str(FEDERATED)]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), "2", str(tmp_path)],
            stderr=subprocess.PIPE,
            env={**os.environ, "DARE_AGG_CACHE": str(tmp_path / "cache of two")},
        )
        for rank in range(2)
    ]
    ends = [(rank.communicate(timeout=500)[1].decode()[-3000:], rank.returncode) for rank in ranks]
    assert all(code == 0 for _, code in ends), ends
    alone = script.run(script.app_of(script.the_model))
    shared = dict(np.load(tmp_path / "final.npz"))
    assert alone.keys() == shared.keys()
    for name, array in alone.items():
        assert np.array_equal(array, shared[name]), name
    for rank in range(2):
        assert "holds whole arrays" in (tmp_path / f"refused-{rank}").read_text()

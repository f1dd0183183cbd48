"""Five parties over TLS merge their own models by secure TIES; one is killed on the way."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dare_agg.flower.processes.launch import run_app

APP = Path(__file__).parents[1] / "apps" / "secure"
NAMES = ["north", "south", "east", "west", "middle"]


def prepare(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, dict[str, np.ndarray]]]:
    """A base, and a tuned model with a head of its own a party."""
    rng = np.random.default_rng(1)
    base = {"body.w": rng.normal(size=(100, 200)).astype(np.float32)}
    save_file(base, folder / "base.safetensors")
    tuned = {}
    for name in NAMES:
        delta = rng.normal(0.002, 0.01, (100, 200)).astype(np.float32)
        tuned[name] = {"body.w": base["body.w"] + delta, "head.w": rng.normal(size=(3, 2))}
        save_file(tuned[name], folder / f"{name}.safetensors")
    return base, tuned


@pytest.mark.federation
@pytest.mark.slow
def test_secure_ties_completes_when_a_party_is_killed(
    federation, consortium, tmp_path: Path
) -> None:
    base, tuned = prepare(tmp_path)
    _, node_config = consortium(NAMES)
    # Each SuperNode runs this app alone, whatever the SuperLink sends.
    fed = federation(
        names=NAMES, app=APP, supernode=("dare-agg", "supernode", "--app", str(APP), "--")
    )
    fed.start_superlink()
    with ThreadPoolExecutor(5) as pool:
        list(pool.map(fed.register, NAMES))
    for name in NAMES:
        fed.node_config = {
            **node_config(name),
            "base-path": str(tmp_path / "base.safetensors"),
            "model-path": str(tmp_path / f"{name}.safetensors"),
            "merged-path": str(tmp_path / f"merged-{name}.safetensors"),
        }
        fed.start_node(name)
    lines: list[str] = []

    def watch(line: str) -> None:
        lines.append(line)
        # Everyone holds everyone's shares now, and no vector has been sent.
        if "stage share: 5 of 5" in line:
            fed.kill_9("west")

    settings = fed._settings(
        tmp_path / "out",
        {"base": str(tmp_path / "base.safetensors"), "roster": str(tmp_path / "roster.json")},
    )
    # Flower reports the dead node within 60 s, which ends the stage; a busy machine needs the rest.
    settings["stage-seconds"] = 150.0
    foreign = Path(shutil.copytree(APP, tmp_path / "foreign"))
    with (foreign / "private" / "client_app.py").open("a") as code:
        code.write("\nopen('/proc/self/environ').read()\n")
    refused = run_app(foreign, fed.home, "dep", settings)
    assert not refused.ok and "could not be verified" in refused.detail, refused
    status = run_app(APP, fed.home, "dep", settings, on_line=watch)
    assert status.ok, (status, lines[-30:])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    stayed = [name for name in NAMES if name != "west"]
    assert sorted(report["parties"]) == sorted(report["result_at"]) == sorted(stayed)
    assert [(r["name"], r["detail"].split(":")[0]) for r in report["rejected"]] == [
        ("west", "stage contribute")
    ]
    merged = load_file(tmp_path / "out" / "merged.safetensors")["body.w"]
    deltas = np.array([tuned[name]["body.w"] - base["body.w"] for name in stayed])
    agree = np.sign(deltas) == np.sign(deltas.sum(0))
    plain = 2 * (deltas * agree).sum(0) / np.maximum(agree.sum(0), 1)
    step = merged - base["body.w"]
    touched = step != 0
    assert 0.45 < touched.mean() < 0.55
    # Where the sum, or one value, is all but zero, rounding may choose the other sign.
    clear = touched & (np.abs(deltas.sum(0)) > 1e-4) & (np.abs(deltas) > 1e-5).all(0)
    assert clear.sum() > 9000
    assert np.abs(step - plain)[clear].max() < 1e-4
    for name in stayed:
        mine = load_file(tmp_path / f"merged-{name}.safetensors")
        assert np.array_equal(mine["body.w"], merged)
        assert np.array_equal(mine["head.w"], tuned[name]["head.w"])
    assert not (tmp_path / "merged-west.safetensors").exists()
    print(json.dumps({key: report[key] for key in ("upload_bytes", "lone_share", "stage_seconds")}))

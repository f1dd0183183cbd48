"""Secure merging at size: parties with models of 22.7 M parameters, over TLS, a real SuperLink.

``python -m simulations.bench.secure_size [--parties 4] [--parameters 22.7e6] [--drop-rate 0.5]
[--folder DIR]`` starts a SuperLink and pinned SuperNodes as processes of their own, merges the
parties' models by secure TIES and prints minutes, bytes and each process's peak memory. On a
machine with nothing else to do.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from dare_agg.flower.processes.launch import run_app
from dare_agg.secure.identity import new_identity, write_identity, write_public
from dare_agg.secure.roster import make_roster, sign_roster, write_roster
from simulations.bench.federation import Federation
from simulations.runs.looking import Looking
from simulations.runs.memory import memory_of
from simulations.runs.process_groups import descendants

APP = Path(__file__).parents[2] / "tests" / "apps" / "secure"
PASSPHRASE = "of the whole benchmark"
ROWS = 1024


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m simulations.bench.secure_size")
    parser.add_argument("--parties", type=int, default=4)
    parser.add_argument("--parameters", type=float, default=22.7e6)
    parser.add_argument("--drop-rate", default="0.5")
    parser.add_argument("--stage-seconds", type=float, default=900.0)
    parser.add_argument("--folder", type=Path, help="where everything is kept; else nothing is")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        found = merge_at_size(
            folder,
            options.parties,
            int(options.parameters),
            options.drop_rate,
            options.stage_seconds,
        )
    print(json.dumps(found, indent=1))
    sys.exit(0 if found["completed"] else 1)


def merge_at_size(
    folder: Path, parties: int, parameters: int, drop_rate: str, stage_seconds: float
) -> dict[str, Any]:
    """Set up the federation, merge once, and return what was measured."""
    names = [f"party-{number}" for number in range(parties)]
    prepare(folder, names, parameters)
    fed = Federation(
        folder, names, app=APP, supernode=("dare-agg", "supernode", "--app", str(APP), "--")
    )
    peaks: dict[str, int] = {}
    lines: list[str] = []
    try:
        fed.start_superlink()
        for name in names:
            fed.register(name)
            fed.node_config = {
                "secure-identity": str(folder / f"{name}.key"),
                "secure-roster": str(folder / "roster.json"),
                "secure-trust": str(folder / "coordinator.pub"),
                "secure-passphrase-file": str(folder / "passphrase"),
                "secure-state": str(folder / "state"),
                "base-path": str(folder / "base.safetensors"),
                "model-path": str(folder / f"{name}.safetensors"),
                "merged-path": str(folder / f"merged-{name}.safetensors"),
            }
            fed.start_node(name)
        settings = fed._settings(
            folder / "out",
            {
                "base": str(folder / "base.safetensors"),
                "roster": str(folder / "roster.json"),
                "drop-rate": drop_rate,
            },
        )
        settings["stage-seconds"] = stage_seconds
        began = time.monotonic()
        with Looking(partial(note_memory, fed, peaks), 0.5):
            status = run_app(APP, fed.home, "dep", settings, on_line=lines.append)
        minutes = (time.monotonic() - began) / 60
    finally:
        fed.stop_all()
        (folder / "run.log").write_text("\n".join(lines))
    found: dict[str, Any] = {
        "completed": status.ok,
        "minutes": round(minutes, 2),
        "parties": parties,
        "parameters": parameters,
        "peak_mib": {name: round(peak / 2**20) for name, peak in sorted(peaks.items())},
        "database_mib": round((folder / "state.db").stat().st_size / 2**20),
    }
    report = folder / "out" / "report.json"
    if not status.ok or not report.is_file():
        return {**found, "detail": status.detail, "log": lines[-20:]}
    measured = json.loads(report.read_text())
    merged = load_file(folder / "out" / "merged.safetensors")
    same = [
        name
        for name in names
        if all(
            np.array_equal(array, merged[key])
            for key, array in load_file(folder / f"merged-{name}.safetensors").items()
            if key in merged and not key.startswith("head")
        )
    ]
    return {
        **found,
        "vector_mb": [round(size / 1e6, 1) for size in measured["upload_bytes"]],
        "result_at": measured["result_at"],
        "same_result": same,
        "rejected": measured["rejected"],
        "stage_seconds": {k: round(v, 1) for k, v in measured["stage_seconds"].items()},
    }


def prepare(folder: Path, names: list[str], parameters: int) -> None:
    """Keys, a signed roster, a base and a tuned model for each party."""
    coordinator = new_identity("coordinator")
    write_public(folder / "coordinator.pub", "coordinator", coordinator.public)
    members = []
    for name in names:
        identity = new_identity(name)
        write_identity(folder / f"{name}.key", identity, PASSPHRASE)
        members.append((name, identity.public))
    write_roster(folder / "roster.json", sign_roster(make_roster("size", members), coordinator))
    (folder / "passphrase").write_text(PASSPHRASE)
    (folder / "passphrase").chmod(0o600)
    rng = np.random.default_rng(1)
    columns = 512
    blocks = max(1, parameters // (ROWS * columns))
    base = {
        f"body.{number}.weight": rng.normal(0, 0.05, (ROWS, columns)).astype(np.float32)
        for number in range(blocks)
    }
    save_file(base, folder / "base.safetensors")
    for name in names:
        tuned = {
            key: array + rng.normal(0, 0.002, array.shape).astype(np.float32)
            for key, array in base.items()
        }
        tuned["head.weight"] = rng.normal(size=(8, columns)).astype(np.float32)
        save_file(tuned, folder / f"{name}.safetensors")


def note_memory(fed: Federation, peaks: dict[str, int]) -> None:
    """Keep the largest anonymous memory of each of our processes and of what it started."""
    for name, process in list(fed.processes.items()):
        for pid in [process.pid, *descendants([process.pid])]:
            key = name if pid == process.pid else f"{name}: {_what(pid)}"
            peaks[key] = max(peaks.get(key, 0), _anonymous(pid))


def _what(pid: int) -> str:
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        for word in words:
            if b"flwr" in word or b"flower" in word:
                return Path(word.decode(errors="replace")).name
    return "process"


def _anonymous(pid: int) -> int:
    with contextlib.suppress(OSError):
        return memory_of(pid)[0]
    return 0


if __name__ == "__main__":
    main()

"""The payload of a job in NVFlare 2.9: its FedAvg, its tensor streaming, DARE; bytes and memory.

    bash scripts/nvflare.sh make                          # the environment .venv-nvflare
    python -m simulations.bench.nvflare fedavg stream 0.9 0.99
    python -m simulations.bench.nvflare 0.9 0.99 --real --clients 2

A way is "fedavg", "stream" or a drop rate of DARE. The model has the shapes of a GPT-2 (11 layers
of width 1024: 191 million float32, 764 MB); the training script makes up a change of every value
in place. In NVFlare's simulator the server and each client are a process; with ``--real`` a server
and clients are provisioned (mutual TLS) and started from their kits, and the job is submitted by an
administrator. Bytes are those of TCP as the kernel counts them for the sockets of a client's
processes (``ss -i``; with ``--real``, of those to the server's port), so NVFlare's frames,
its other messages and TLS are in them. Memory is the peak of the own pages of the server's
processes together, and of one client's. Appends to ``results/nvflare.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from simulations.bench.nvflare.federation import Federation
from simulations.bench.nvflare.watch import Watch, watch_job
from simulations.runs.checkpoints import gpt2_shapes
from simulations.runs.process_groups import command_of, descendants
from simulations.runs.rows import RESULTS, append_row

HERE = Path(__file__).parent
ROOT = Path(__file__).parents[3]


def simulator_parties(pid: int) -> dict[str, list[int]]:
    """Processes of a simulator's server and clients among the descendants of a process."""
    found: dict[str, list[int]] = {}
    for child in descendants([pid]):
        command = command_of(child).split("\0")
        if any("simulator_worker" in word for word in command):
            found.setdefault(command[command.index("--client") + 1], []).append(child)
        elif any("simulator.simulator" in word for word in command):
            found.setdefault("server", []).append(child)
    return found


def measure(options: argparse.Namespace, way: str, folder: Path) -> dict[str, Any]:
    """Run one job and watch it."""
    shapes = gpt2_shapes(options.layers, options.hidden)
    (folder / "shapes.json").write_text(json.dumps(shapes), encoding="utf-8")
    log = folder / "received.jsonl"
    settings = {
        "REACH_SHAPES": str(folder / "shapes.json"),
        "REACH_LOG": str(log),
        "DARE_AGG_CACHE": str(folder / "cache"),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    binaries = options.environment.resolve() / "bin"
    words = [str(binaries / "python"), str(HERE / "job.py"), way]
    words += [str(options.clients), str(options.rounds)]
    if options.threads:
        words += ["--threads", str(options.threads)]

    def run(where: list[str], groups: Callable[[int], dict[str, list[int]]], port: int | None):
        with (folder / "job.log").open("wb") as said:
            job = subprocess.Popen(
                [*words, *where], stdout=said, stderr=said, cwd=folder,
                env={**os.environ, **settings},
            )  # fmt: skip
        figures = watch_job(lambda: job.poll() is None, Watch(lambda: groups(job.pid), log, port))
        if job.returncode or figures["models_received"] != options.clients * options.rounds:
            said = (folder / "job.log").read_text(errors="replace")[-3000:]
            raise SystemExit(f"error: the job ended with {job.returncode}: {said}")
        return figures

    if options.real:
        with Federation(folder, options.clients, binaries, settings) as federation:
            figures = run(
                ["--kit", str(federation.administrator)],
                lambda _: {
                    name: [process.pid, *descendants([process.pid])]
                    for name, process in federation.processes.items()
                },
                federation.port,
            )
    else:
        figures = run(["--simulator", str(folder / "simulator")], simulator_parties, None)
    return {
        "way": way,
        "where": "federation" if options.real else "simulator",
        "parameters": sum(int(np.prod(shape)) for shape in shapes.values()),
        "clients": options.clients,
        "rounds": options.rounds,
        **({"at_a_time": options.threads} if options.threads else {}),
        **figures,
    }


def release_of(environment: Path) -> str:
    """The version of NVFlare in an environment."""
    asked = "from importlib.metadata import version; print(version('nvflare'))"
    done = subprocess.run(
        [environment / "bin" / "python", "-c", asked], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(
            f"error: {environment} has no nvflare: bash scripts/nvflare.sh make makes one"
        )
    return done.stdout.strip()


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m simulations.bench.nvflare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("ways", nargs="+")
    parser.add_argument("--real", action="store_true", help="a provisioned federation")
    parser.add_argument("--environment", type=Path, default=ROOT / ".venv-nvflare")
    parser.add_argument("--layers", type=int, default=11)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="clients at a time in the simulator")
    parser.add_argument("--folder", type=Path, help="for files, instead of the system's")
    parser.add_argument("--out", type=Path, default=RESULTS / "nvflare.jsonl")
    options = parser.parse_args()
    release = release_of(options.environment)
    for way in options.ways:
        with tempfile.TemporaryDirectory(prefix="nvflare-", dir=options.folder) as folder:
            row = {"nvflare": release, **measure(options, way, Path(folder))}
        append_row(options.out, row)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()

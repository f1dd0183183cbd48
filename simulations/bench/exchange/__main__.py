"""A model sent down and up without training, by NVFlare 2.9 and by Flower's FedAvg.

    python -m venv nvflare-env && nvflare-env/bin/pip install nvflare==2.9.0 torch safetensors
    sudo python -m simulations.bench.exchange nvflare-stream --environment nvflare-env
    sudo python -m simulations.bench.exchange flower flower-memory

The shapes are GPT-2's (124 million float32), for four clients and three rounds; every client
returns what it received (under Flower, which sends equal contents once, each times a number of its
own; ``flower`` keeps them in SQLite, ``flower-memory`` as SuperLink does without --database).
``server_anonymous_mib`` is the peak of the own memory of the server's
processes together, ``client_anonymous_mib`` that of one client's (the largest). Bytes are those
of TCP, a client and round: sockets of the client's process for NVFlare, whose simulator gives
each a process and runs in a network namespace; the line to the clients' namespace for Flower
(SuperLink and SuperNodes over TLS). ``seconds`` lie between the rounds that a client sees begin.
Appends to ``results/exchange.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from simulations.bench.exchange.network import Namespace, Sockets
from simulations.bench.federation import Federation
from simulations.runs.checkpoints import gpt2_shapes
from simulations.runs.process_groups import GroupPeaks, command_of, descendants
from simulations.runs.rows import RESULTS, append_row

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Task:
    """What is exchanged, and where the run may keep files."""

    shapes: dict[str, tuple[int, ...]]
    clients: int
    rounds: int
    folder: Path
    environment: Path | None

    @property
    def shapes_file(self) -> Path:
        return self.folder / "shapes.json"

    @property
    def log(self) -> Path:
        return self.folder / "received.jsonl"

    def a_round(self, nbytes: int) -> int:
        return round(nbytes / self.clients / self.rounds)


def nvflare(task: Task, way: str) -> dict[str, Any]:
    """NVFlare's FedAvg recipe in its simulator, one process for the server and one a client."""
    if task.environment is None:
        raise SystemExit("error: --environment names the environment that has nvflare")
    python = task.environment / "bin" / "python"
    words = [
        str(python), str(HERE / "nvflare_job.py"), way, str(task.clients),
        str(task.rounds), str(task.folder / "workspace"),
    ]  # fmt: skip
    settings = [f"EXCHANGE_SHAPES={task.shapes_file}", f"EXCHANGE_LOG={task.log}"]
    asked = [str(python), "-c", "from importlib.metadata import version; print(version('nvflare'))"]
    release = subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()
    with Namespace() as namespace, (task.folder / "nvflare.log").open("w") as log:
        job = subprocess.Popen(
            [*namespace.prefix, "env", *settings, *words],
            stdout=log, stderr=log, cwd=task.folder,
        )  # fmt: skip
        known: dict[str, set[int]] = {}

        def groups() -> dict[str, list[int]]:
            found: dict[str, list[int]] = {}
            for pid in descendants([job.pid]):
                command = command_of(pid).split("\0")
                if any("simulator_worker" in word for word in command):
                    found.setdefault(command[command.index("--client") + 1], []).append(pid)
                elif any("simulator.simulator" in word for word in command):
                    found.setdefault("server", []).append(pid)
            for name, pids in found.items():
                known.setdefault(name, set()).update(pids)
            return found

        sockets = Sockets(namespace)
        with GroupPeaks(groups) as peaks:
            while job.poll() is None:
                sockets.look()
                time.sleep(0.2)
        if job.returncode:
            said = Path(log.name).read_text(encoding="utf-8", errors="replace")
            raise SystemExit(f"error: NVFlare ended with {job.returncode}: {said[-2000:]}")
    clients = {pid for name, pids in known.items() if name != "server" for pid in pids}
    up, down = sockets.of(clients)
    return {"version": f"nvflare {release}", **_measured(task, peaks, up, down)}


def flower(task: Task, database: str = "") -> dict[str, Any]:
    """Flower's FedAvg: SuperLink with a database, SuperNodes behind a line of their own."""
    names = [f"party-{number}" for number in range(task.clients)]
    with Namespace() as namespace:
        federation = Federation(
            task.folder / "federation",
            names,
            host=namespace.near,
            prefix=lambda name: namespace.prefix,
            app=HERE / "app",
            database=database,
        )

        def groups() -> dict[str, list[int]]:
            return {
                "server" if name == "superlink" else name: [p.pid, *descendants([p.pid])]
                for name, p in list(federation.processes.items())
            }

        try:
            federation.start_all()
            before = namespace.carried()
            with GroupPeaks(groups) as peaks:
                status = federation.run(
                    task.folder / "out",
                    min_clients=task.clients,
                    num_rounds=task.rounds,
                    shapes=str(task.shapes_file),
                    log=str(task.log),
                )
            up, down = (now - then for now, then in zip(namespace.carried(), before, strict=True))
        finally:
            federation.stop_all()
    if not status.ok:
        logs = [federation.folder / "run.log", *federation.folder.glob("*.log")]
        said = [f"{log.name}: {log.read_text(errors='replace')[-2000:]}" for log in logs]
        raise SystemExit("\n".join([*said, f"error: the run ended as {status.status}"]))
    return {"version": f"flwr {version('flwr')}", **_measured(task, peaks, up, down)}


def _measured(task: Task, peaks: GroupPeaks, up: int, down: int) -> dict[str, Any]:
    began: dict[int, float] = {}
    received = [json.loads(line) for line in task.log.read_text(encoding="utf-8").splitlines()]
    for line in received:
        began[line["round"]] = min(began.get(line["round"], np.inf), line["time"])
    if len(received) != task.clients * task.rounds:
        raise SystemExit(f"error: {len(received)} models were received")
    first, last = min(began), max(began)
    return {
        "server_anonymous_mib": peaks.own["server"] >> 20,
        "client_anonymous_mib": max(v for n, v in peaks.own.items() if n != "server") >> 20,
        "upload_bytes": task.a_round(up),
        "download_bytes": task.a_round(down),
        "seconds": round((began[last] - began[first]) / (last - first), 1),
    }


TOOLS: dict[str, Callable[[Task], dict[str, Any]]] = {
    "flower": flower,
    "flower-memory": lambda task: flower(task, ":flwr-in-memory:"),
    "nvflare": lambda task: nvflare(task, "plain"),
    "nvflare-stream": lambda task: nvflare(task, "stream"),
    "nvflare-disk": lambda task: nvflare(task, "disk"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m simulations.bench.exchange",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("tools", nargs="+", choices=TOOLS)
    parser.add_argument("--environment", type=Path, help="the one that has nvflare")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="for files, instead of the system's")
    parser.add_argument("--out", type=Path, default=RESULTS / "exchange.jsonl")
    options = parser.parse_args()
    shapes = gpt2_shapes(options.layers, options.hidden)
    environment = options.environment and options.environment.resolve()
    for tool in options.tools:
        with tempfile.TemporaryDirectory(prefix="exchange-", dir=options.folder) as folder:
            task = Task(shapes, options.clients, options.rounds, Path(folder), environment)
            task.shapes_file.write_text(json.dumps(shapes))
            row = {
                "tool": tool,
                "parameters": sum(int(np.prod(shape)) for shape in shapes.values()),
                "dtype": "float32",
                "clients": options.clients,
                "rounds": options.rounds,
                **TOOLS[tool](task),
            }
        append_row(options.out, row)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()

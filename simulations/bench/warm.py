"""Seconds a round with and without the warm trainer, in a real deployment of the real app.

``python -m simulations.bench.warm`` starts a SuperLink and two SuperNodes over TLS, fine-tunes
the encoder of the headline for a few rounds: with Flower's process a message ("cold"), with
trainers that stay ("warm"), both of which are killed with -9 in the middle, and under
``dare_agg.flower.supernode`` ("quick"), where nothing is killed. Writes ``results/warm.jsonl``.
The results of all runs must be the same bits.

Besides the seconds on the clock it counts the CPU seconds of all the federation's processes:
those are the same on a busy machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from dare_agg.runs.rows import METRICS_FILE, STATE_FILE
from simulations.bench.federation import Federation
from simulations.runs.rows import RESULTS, versions

ROOT = Path(__file__).parents[2]
# The first two are also numbers: of rows whether they were warm.
FORMS = ("cold", "warm", "quick")
QUICK = (sys.executable, "-m", "dare_agg.flower.supernode")
CONFIG = {
    "downlink": "auto",
    "drop-rate": "0.99",
    "train-rows": 400,
    "test-rows": 64,
    "length": 32,
    "steps": 5,
    "evaluate": False,
    "save-model": False,
}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m simulations.bench.warm", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=FORMS, help="this one, the others are kept")
    parser.add_argument("--out", type=Path, default=RESULTS / "warm.jsonl")
    options = parser.parse_args()
    kept = options.out.read_text().splitlines() if options.only and options.out.exists() else []
    rows = {row.get("form", FORMS[row["warm"]]): row for row in map(json.loads, kept)}
    with tempfile.TemporaryDirectory(prefix="dare-base-") as name:
        initial = Path(name) / "base.safetensors"
        keys = [f"{key}={value}" for key, value in CONFIG.items() if key.endswith("-rows")]
        make = [sys.executable, "-m", "client.base", "-o", str(initial), *keys]
        subprocess.run(make, check=True)
        for form in FORMS:
            if options.only in (None, form):
                rows[form] = {**measure(form, options.rounds, initial), **versions()}
                options.out.write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
    if len({row["fingerprint"] for row in rows.values()}) != 1:
        raise SystemExit(f"the forms differ: {rows}")


class CpuSeconds(threading.Thread):
    """Adds up the CPU time of every process whose environment names ``home``."""

    def __init__(self, home: Path) -> None:
        super().__init__(daemon=True)
        self.mark = f"FLWR_HOME={home}\0".encode()
        self.seen: dict[tuple[int, str], float] = {}
        self.running = True

    def run(self) -> None:
        while self.running:
            self.total()
            time.sleep(0.3)

    def total(self) -> float:
        """CPU seconds so far, of processes that ended too."""
        ticks = os.sysconf("SC_CLK_TCK")
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if self.mark in (entry / "environ").read_bytes():
                    fields = (entry / "stat").read_text().rpartition(")")[2].split()
                    used = (int(fields[11]) + int(fields[12])) / ticks
                    self.seen[int(entry.name), fields[19]] = used
        return sum(self.seen.values())


def measure(form: str, rounds: int, initial: Path) -> dict[str, Any]:
    """One run; returns the seconds of each round."""
    warm, quick = form == "warm", form == "quick"
    with tempfile.TemporaryDirectory(prefix="dare-warm-") as name:
        folder = Path(name)
        (folder / "run").mkdir()
        fed = Federation(
            folder,
            ["north", "south"],
            app=ROOT,
            environment={"XDG_RUNTIME_DIR": str(folder / "run")},
            node_config={"warm": warm or quick},
            supernode=QUICK if quick else ("flower-supernode",),
        )
        out = folder / "out"
        killer = threading.Thread(target=kill_trainers, args=(folder, out, rounds // 2))
        cpu = CpuSeconds(fed.home)
        used: list[float] = []
        try:
            fed.start_all()
            cpu.start()
            if warm:
                killer.start()
            threading.Thread(target=note_rounds, args=(out, cpu, used), daemon=True).start()
            status = fed.run(out, **{**CONFIG, "num-rounds": rounds, "initial": str(initial)})
            if not status.ok:
                raise SystemExit(f"the run failed: {status}")
            until = time.monotonic() + 30
            while len(used) < rounds and time.monotonic() < until:
                time.sleep(0.1)
        except BaseException:
            for name in ("superlink", "north"):
                print(f"--- {name}\n{fed.log(name)[-3000:]}", file=sys.stderr)
            raise
        finally:
            cpu.running = False
            fed.stop_all()
        if warm:
            killer.join()
        lines = (out / METRICS_FILE).read_text().splitlines()
        state = json.loads((out / STATE_FILE).read_text())
    seconds = [json.loads(line)["seconds"] for line in lines]
    each = [round(b - a, 1) for a, b in zip([0.0, *seconds], seconds, strict=False)]
    row = {
        "form": form,
        "warm": warm or quick,
        "clients": 2,
        "seconds_a_round": each,
        "median_seconds_a_round": round(statistics.median(each[1:]), 1),
        # Without the first round, which brings the base and starts what stays.
        "cpu_seconds_a_round": round((used[-1] - used[0]) / (rounds - 1), 1),
        "trainers_killed_after_round": rounds // 2 if warm else None,
        "load": round(os.getloadavg()[0], 1),
        "fingerprint": next(iter(state["fingerprints"].values())),
    }
    print(json.dumps(row), flush=True)
    return row


def note_rounds(output: Path, cpu: CpuSeconds, used: list[float]) -> None:
    """Note the CPU seconds used at the end of each round."""
    metrics = output / METRICS_FILE
    while cpu.running:
        done = len(metrics.read_text().splitlines()) if metrics.is_file() else 0
        while len(used) < done:
            used.append(cpu.total())
        time.sleep(0.1)


def kill_trainers(folder: Path, output: Path, after: int) -> None:
    """kill -9 of the trainers once so many rounds are done."""
    metrics = output / METRICS_FILE
    until = time.monotonic() + 1800
    while time.monotonic() < until:
        if metrics.is_file() and len(metrics.read_text().splitlines()) >= after:
            break
        time.sleep(0.2)
    for log in (folder / "run").glob("*/*.log"):
        for line in log.read_text(errors="replace").splitlines():
            if "warm trainer " in line and " listens" in line:
                pid = int(line.split("warm trainer ")[1].split()[0])
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()

"""Seconds of a deployed round in which training takes nothing: what Flower and we add to it.

``python -m simulations.bench.idle_rounds`` starts a SuperLink and two SuperNodes over TLS with
registered keys and lets the small app of tests/apps/edge, whose clients add a drawn delta, go
through some rounds: under ``flower-supernode`` with a process a message, and under
``python -m dare_agg.flower.supernode``, whose trainers stay. Writes
``results/idle_rounds.jsonl``; both end at the same fingerprint, or it fails.

Seconds on the clock are those of the machine as it was; the CPU seconds of all processes of the
federation are not much longer on a busy one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from simulations.bench.federation import Federation, finished_rounds, read_report
from simulations.bench.warm import CpuSeconds
from simulations.runs.rows import RESULTS, versions

SITES = ("north", "south")
# Command of a SuperNode, and what its node config says.
FORMS: Mapping[str, tuple[tuple[str, ...], dict[str, bool]]] = {
    "flower-supernode": (("flower-supernode",), {"warm": False}),
    "dare_agg.flower.supernode": ((sys.executable, "-m", "dare_agg.flower.supernode"), {}),
}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m simulations.bench.idle_rounds")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--parameters", type=int, default=100_000)
    parser.add_argument("--only", choices=FORMS, help="this one; the other row is kept")
    parser.add_argument("--out", type=Path, default=RESULTS / "idle_rounds.jsonl")
    options = parser.parse_args()
    kept = options.out.read_text().splitlines() if options.only and options.out.exists() else []
    rows = {row["supernode"]: row for row in map(json.loads, kept)}
    for form in FORMS:
        if options.only in (None, form):
            rows[form] = {**measure(form, options.rounds, options.parameters), **versions()}
            options.out.write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
    if len({row["fingerprint"] for row in rows.values()}) != 1:
        raise SystemExit(f"the forms differ: {rows}")


def measure(form: str, rounds: int, parameters: int) -> dict[str, Any]:
    """One run under this form's SuperNodes."""
    supernode, node_config = FORMS[form]
    with tempfile.TemporaryDirectory(prefix="dare-idle-") as name:
        folder = Path(name)
        (folder / "run").mkdir()
        fed = Federation(
            folder,
            SITES,
            supernode=supernode,
            environment={"XDG_RUNTIME_DIR": str(folder / "run")},
            node_config=node_config,
        )
        out = folder / "out"
        cpu = CpuSeconds(fed.home)
        marks: list[tuple[float, float]] = []
        noting = threading.Thread(target=_note, args=(out, cpu, rounds, marks), daemon=True)
        try:
            fed.start_all()
            cpu.start()
            noting.start()
            status = fed.run(out, **{"num-rounds": rounds, "size": parameters, "deadline": 600})
            if not status.ok:
                raise SystemExit(f"the run failed: {status}\n{fed.log('superlink')[-2000:]}")
            noting.join(30)
            report = read_report(out)
            assert report is not None
        finally:
            cpu.running = False
            fed.stop_all()
    each = [round(row["seconds"], 2) for row in report["rounds"]]
    row = {
        "supernode": form,
        "clients": len(SITES),
        "parameters": parameters,
        "seconds_a_round": each,
        # The first brings the base and starts what stays.
        "median_seconds_a_round": statistics.median(each[1:]),
        "cpu_seconds_a_round": round((marks[-1][1] - marks[0][1]) / (len(marks) - 1), 2),
        "load": round(os.getloadavg()[0], 1),
        "fingerprint": report["fingerprint"],
    }
    print(json.dumps(row), flush=True)
    return row


def _note(output: Path, cpu: CpuSeconds, rounds: int, marks: list[tuple[float, float]]) -> None:
    """Note the clock and the CPU seconds used at the end of each round."""
    while cpu.running and len(marks) < rounds:
        while len(marks) < min(finished_rounds(output), rounds):
            marks.append((time.monotonic(), cpu.total()))
        time.sleep(0.05)


if __name__ == "__main__":
    main()

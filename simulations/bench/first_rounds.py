"""Seconds from making keys to the fourth round of a real deployment, as docs/DEPLOY.md sets one up.

``python -m simulations.bench.first_rounds`` makes certificates and identities, starts SuperLink,
SuperExec and two SuperNodes over TLS (process isolation, registered keys, signed updates), and
fine-tunes the encoder of the headline for four rounds of five steps. Writes
``results/first_rounds.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from dare_agg.runs.rows import METRICS_FILE
from simulations.bench.federation import Federation
from simulations.bench.warm import CONFIG, ROOT
from simulations.runs.rows import RESULTS, versions

ROUNDS = 4
SITES = ("north", "south")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m simulations.bench.first_rounds")
    parser.add_argument("--out", type=Path, default=RESULTS / "first_rounds.jsonl")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dare-first-") as name:
        folder = Path(name)
        (folder / "run").mkdir()
        began = time.monotonic()
        fed = Federation(
            folder,
            SITES,
            app=ROOT,
            isolation="process",
            supernode=(sys.executable, "-m", "dare_agg.flower.supernode"),
            environment={"XDG_RUNTIME_DIR": str(folder / "run")},
        )
        marks = {"keys": time.monotonic() - began}
        out = folder / "out"
        try:
            fed.start_all()
            marks["everything started"] = time.monotonic() - began
            status = fed.run(out, **{**CONFIG, "num-rounds": ROUNDS})
            if not status.ok:
                raise SystemExit(f"the run failed: {status}\n{fed.log('superexec')[-3000:]}")
            marks["the run's end"] = time.monotonic() - began
        finally:
            fed.stop_all()
        lines = (out / METRICS_FILE).read_text().splitlines()
        rounds = [round(json.loads(line)["seconds"], 1) for line in lines]
    row = {
        "clients": len(SITES),
        "rounds": ROUNDS,
        "seconds": {name: round(at, 1) for name, at in marks.items()},
        "seconds_at_the_end_of_rounds_from_the_run_s_start": rounds,
        "load": round(os.getloadavg()[0], 1),
        **versions(),
    }
    print(json.dumps(row), flush=True)
    with options.out.open("a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()

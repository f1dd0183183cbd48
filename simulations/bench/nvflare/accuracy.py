"""Accuracy of a small real job in NVFlare's simulator: its FedAvg and DARE, over seeds.

    bash scripts/nvflare.sh make                          # the environment .venv-nvflare
    python -m simulations.bench.nvflare.accuracy fedavg auto 0.9

Handwritten digits (scikit-learn's copy of UCI's; 719 test rows), a network of 15,010 parameters,
four clients with different label mixtures, one training script for all ways: `digits_train.py`.
A way is "fedavg" or a drop rate of DARE. Appends to ``results/nvflare_accuracy.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from simulations.bench.nvflare.__main__ import ROOT, release_of
from simulations.runs.rows import RESULTS, append_row


def run_job(environment: Path, way: str, seed: int, clients: int, rounds: int) -> dict[str, Any]:
    """One job in a process of NVFlare's environment; its row."""
    with tempfile.TemporaryDirectory(prefix="nvflare-digits-") as folder:
        words = [way, str(seed), str(clients), str(rounds), folder]
        done = subprocess.run(
            [environment / "bin/python", "-m", "simulations.bench.nvflare.digits_job", *words],
            capture_output=True, text=True, check=False, cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
                 "DARE_AGG_CACHE": f"{folder}/cache"},
        )  # fmt: skip
    results = [line for line in done.stdout.splitlines() if line.startswith("result: ")]
    if done.returncode or len(results) != 1:
        said = f"{done.stdout[-2000:]}{done.stderr[-2000:]}"
        raise SystemExit(f"error: the job ended with {done.returncode}: {said}")
    return json.loads(results[0].removeprefix("result: "))


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m simulations.bench.nvflare.accuracy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("ways", nargs="+")
    parser.add_argument("--environment", type=Path, default=ROOT / ".venv-nvflare")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--out", type=Path, default=RESULTS / "nvflare_accuracy.jsonl")
    options = parser.parse_args()
    environment = options.environment.resolve()
    release = release_of(environment)
    for seed in options.seeds:
        for way in options.ways:
            row = {
                "nvflare": release,
                "clients": options.clients,
                "rounds": options.rounds,
                **run_job(environment, way, seed, options.clients, options.rounds),
            }
            append_row(options.out, row)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()

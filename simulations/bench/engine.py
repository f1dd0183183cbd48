"""A federation of 1,000 simulated clients with Flower's own engine.

``python -m simulations.bench.engine`` runs the app as ``dare-agg run --clients 1000`` does: a
SuperLink, Ray actors, one message a client and exchange. The model is a ResNet of 79,312
parameters from a seed, the data Fashion-MNIST with a label mixture for each client (about 60
pictures each). Appends a line to ``results/engine.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from dare_agg.runs.rows import METRICS_FILE
from simulations.runs.looking import Looking
from simulations.runs.rows import RESULTS, append_row, versions

CONFIG = {
    "data": "fashion-mnist",
    "image-size": 28,
    "alpha": 0.5,
    "drop-rate": "0.9",
    "batch": 16,
    "steps": 4,
    "learning-rate": 2e-3,
    "head-learning-rate": 5e-3,
    "test-rows": 10000,
    "save-model": False,
    "keep-state": False,
}
KEPT = ("round", "accuracy", "accepted", "upload_bytes", "message_upload_bytes", "download_bytes")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m simulations.bench.engine", description=__doc__)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--method", default="dare-task-arithmetic", help="or fedavg")
    parser.add_argument("--out", type=Path, default=RESULTS / "engine.jsonl")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dare-engine-") as name:
        row = measure(Path(name), options.clients, options.rounds, options.method)
    print(json.dumps(row))
    append_row(options.out, row)


def measure(folder: Path, clients: int, rounds: int, method: str) -> dict[str, Any]:
    """Run the app in ``folder``; accuracy, bytes and seconds a round, memory of all processes."""
    from dare_agg.cli.execute import execute

    make_model(folder / "model")
    config = {**CONFIG, "model": str(folder / "model"), "num-rounds": rounds, "methods": method}
    began = time.monotonic()
    with PeakMemory() as memory:
        status = execute(folder / "run", config, clients=clients, watch=print)
    lines = (folder / "run" / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    measured = [json.loads(line) for line in lines]
    return {
        "method": method,
        "clients": clients,
        "status": status.status,
        "rounds": [
            {**{k: row[k] for k in KEPT if k in row}, "seconds": round(row["round_seconds"], 1)}
            for row in measured
        ],
        "wall_seconds": round(time.monotonic() - began, 1),
        "peak_mib": memory.peak >> 20,
        "config": CONFIG,
        "versions": versions(),
    }


def make_model(folder: Path) -> None:
    """Save the small ResNet as a Hugging Face folder."""
    import torch
    from transformers import ResNetConfig, ResNetModel

    torch.manual_seed(0)
    settings = ResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 32, 64],
        depths=[1, 1, 1],
        layer_type="basic",
        image_size=CONFIG["image-size"],
    )
    ResNetModel(settings).save_pretrained(folder)


class PeakMemory(Looking):
    """Largest sum of proportional memory over this process and those below it, in bytes."""

    peak = 0

    def __init__(self) -> None:
        super().__init__(self.look, 5.0)

    def look(self) -> None:
        """Look now."""
        import psutil

        total = 0
        for process in (me := psutil.Process(), *me.children(recursive=True)):
            try:
                total += process.memory_full_info().pss
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        self.peak = max(self.peak, total)


if __name__ == "__main__":
    main()

"""Memory of one client that trains adapters on a language model: bytes a parameter of its base.

    python -m simulations.bench.adapter_memory --model smollm2 --data friends

Each way is a process of its own: it loads the model, trains a few steps, and tells the largest own
memory (``RssAnon``, mapped files too) beyond the interpreter with its libraries.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

import numpy as np

from client.config import configure
from client.tasks.causal_lm import TASK
from client.training import build_task
from simulations.runs.memory import Peak, memory_of

WAYS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"weights": "bfloat16"},
    "bfloat16, checkpointing": {"weights": "bfloat16", "checkpointing": True},
}


def measure(way: str, model: str, data: str, length: int, batch: int) -> dict[str, Any]:
    """Train in this process and measure it."""
    import peft  # noqa: F401  (libraries are counted apart)
    import torch  # noqa: F401

    task = build_task(
        configure(
            task=TASK.name, model=model, data=data, train="lora", lora_rank=16, steps=2,
            lora_targets="all-linear", length=length, batch=batch, train_rows=64, test_rows=8,
            **WAYS[way],
        )
    )  # fmt: skip
    before = memory_of()[0]
    with Peak(period=0.005) as peak:
        state = task.initial_state()
        network = task._load()
        loaded = memory_of()[0]
        task.train(state, np.arange(len(task.train_rows)), seed=(0,))
    adapters = sum(array.size for array in state.values())
    base = sum(p.numel() for p in network.parameters()) - adapters
    return {
        "way": way, "base": base, "adapters": adapters, "length": length, "batch": batch,
        "loaded_bytes_a_parameter": round((loaded - before) / base, 2),
        "peak_bytes_a_parameter": round((peak.own - before) / base, 2),
        "peak_mib": (peak.own - before) >> 20,
    }  # fmt: skip


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m simulations.bench.adapter_memory")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", default="friends")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    words = ["--model", asked.model, "--data", asked.data]
    words += ["--length", str(asked.length), "--batch", str(asked.batch)]
    if asked.way:
        found = measure(asked.way, asked.model, asked.data, asked.length, asked.batch)
        print(json.dumps(found))
        return
    for way in WAYS:
        own = [sys.executable, "-m", "simulations.bench.adapter_memory", *words, "--way", way]
        subprocess.run(own, check=True)


if __name__ == "__main__":
    main()

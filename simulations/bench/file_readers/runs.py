"""Files of a run folder, and the lines of a run's log."""

from __future__ import annotations

import json
from pathlib import Path

from dare_agg.cli.progress import load_config, load_rows, secure_lines, summary_table
from dare_agg.runs.log import Mirror, row_line, seconds_left, state_line
from dare_agg.runs.report import read_run, table_row
from dare_agg.runs.rows import RunRow
from simulations.bench.file_readers.reader import Reader, one_line, whole


def run_folder_reader(folder: Path, name: str) -> Reader:
    """A run folder's rows, or what it says of itself."""
    run = folder / "run"
    run.mkdir()
    rows = [
        {"round": number, "method": method, "accuracy": 0.5, "loss": 1.25, "accepted": 3,
         "update_bytes_per_client": 1000.0, "dense_bytes_per_client": 10, "clients": 3,
         "upload_bytes_per_client": 1010.0, "download_bytes_per_client": 5000, "seconds": 12.5,
         "round_seconds": 6.0, "survivors_per_element": 1.5, "sign_conflict": 0.1,
         "delta_max": 0.01, "parameters": 43, "rejected": [{"client": 1, "reason": "late"}]}
        for method in ("fedavg", "dare-ties") for number in (1, 2)
    ]  # fmt: skip
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    state = {"config": {"num-rounds": 2, "methods": ["fedavg"], "train": "all", "model": "x"},
             "fingerprints": {"fedavg": "ab"}, "token": "t"}  # fmt: skip
    (run / "run.json").write_text(json.dumps(state))
    path = run / name

    def read() -> None:
        for one in read_run(run, histograms=True):
            table_row(one)
        rows, config = load_rows(run), load_config(run)
        seconds_left(rows, config)
        summary_table(rows)
        secure_lines(rows, run)

    return Reader(path, (path.read_bytes(),), read, one_line if name == "metrics.jsonl" else whole)


def log_reader(folder: Path) -> Reader:
    """Lines of a run's log, which hold rows and states for a folder elsewhere."""
    path, copy = folder / "run.log", folder / "copy"
    token = "ab" * 16
    state = {"token": token, "config": {"num-rounds": 2}}
    row = {"round": 1, "method": "fedavg", "accuracy": 0.5}
    text = state_line(state) + "\n" + row_line(RunRow(row), token) + "\n"
    copy.mkdir()

    def read() -> None:
        for place in copy.iterdir():
            place.unlink()
        mirror = Mirror(copy)
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            mirror.take(line)

    return Reader(path, (text.encode(),), read, is_text=True)

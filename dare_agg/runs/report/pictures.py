"""Pictures of a diagnosis: inline SVG, the same bytes for the same run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

COLOURS = ("#6b7280", "#0b7a75", "#e07a1f", "#9d4edd", "#2563eb", "#be123c", "#4d7c0f")


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


def colour_of(index: int) -> str:
    """Colour of the curve number ``index``; after the last the first comes again."""
    return COLOURS[index % len(COLOURS)]


def quantiles_by_layer(
    layers: Sequence[tuple[str, Sequence[float]]], shares: Sequence[float], limit: float
) -> str:
    """Quantiles of |delta| of every tensor, in order, as SVG; ``limit`` is a dashed line."""
    from matplotlib.ticker import LogLocator

    figure, axes = _figure(height=4.2)
    places = range(len(layers))
    for index, share in enumerate(shares):
        # A tensor that did not move leaves a gap: a logarithm has no place for it.
        values = [quantiles[index] or math.nan for _, quantiles in layers]
        axes.plot(places, values, marker="o", markersize=2.5, linewidth=1.2,
                  color=colour_of(index + 1), label=f"q{share:g}")  # fmt: skip
    axes.axhline(limit, color="#be123c", linewidth=1.2, linestyle="--")
    axes.set_yscale("log")
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
    for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        set_formatter(lambda value, _: f"{value:g}")
    axes.tick_params(axis="y", which="minor", labelsize=8)
    step = max(1, len(layers) // 12)
    axes.set_xticks(list(places)[::step])
    axes.set_xticklabels(
        [_tail(name.removesuffix(".weight"), 30) for name, _ in layers][::step],
        rotation=60, ha="right", fontsize=7,
    )  # fmt: skip
    _label(axes, "", "|delta| (log scale)")
    axes.legend(frameon=False, fontsize=9, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4)
    return _svg(figure)


def _tail(name: str, length: int) -> str:
    return name if len(name) <= length else "…" + name[1 - length :]


def agreement_grid(
    names: Sequence[str], cosine: Sequence[Sequence[float]], conflict: Sequence[Sequence[float]]
) -> str:
    """Cosines of all pairs as a coloured grid, with their sign conflict, as SVG."""
    figure, axes = _figure(height=4.2)
    axes.grid(False)
    axes.imshow(cosine, vmin=-1, vmax=1, cmap="PuOr", aspect="auto")
    # Names at one side are enough: they are long.
    numbers = range(1, len(names) + 1)
    axes.set_xticks(range(len(names)), numbers, fontsize=8)
    labels = [f"{_tail(name, 28)}  {n}" for n, name in zip(numbers, names, strict=True)]
    axes.set_yticks(range(len(names)), labels, fontsize=8)
    if len(names) <= 8:
        for i in range(len(names)):
            for j in range(len(names)):
                text = f"{cosine[i][j]:.2f}"
                text += f"\n({100 * conflict[i][j]:.0f} %)" if i != j else ""
                dark = abs(cosine[i][j]) > 0.6
                axes.text(j, i, text, ha="center", va="center", fontsize=8,
                          color="white" if dark else "#14213d")  # fmt: skip
    return _svg(figure)

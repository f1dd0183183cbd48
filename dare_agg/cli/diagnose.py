"""`dare-agg diagnose`: do the models fit the base, and which drop rate is safe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dare_agg.vectors.sources import SAFE_DELTA


def diagnose(
    base: Annotated[Path, typer.Argument(help="A .safetensors file or a model folder.")],
    models: Annotated[
        list[Path], typer.Argument(help="Models, adapters or updates tuned from it.")
    ],
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", help="Regular expression of tensors left out.")
    ] = None,
    layers: Annotated[
        int, typer.Option("--layers", min=0, help="Show this many tensors, largest first.")
    ] = 8,
    report: Annotated[
        Path | None, typer.Option("--report", help="Write an HTML page with plots, too.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure the deltas of models from BASE and say which drop rate looks safe."""
    from dataclasses import replace

    from rich import box
    from rich.table import Table

    from dare_agg.cli.busy import busy
    from dare_agg.cli.output import print_json, stderr_console, stdout_console
    from dare_agg.offline.base import open_base
    from dare_agg.offline.diagnose import QUANTILES, diagnose_deltas
    from dare_agg.offline.model_words import base_word, model_words
    from dare_agg.offline.opening import open_models
    from dare_agg.offline.range_check import bases_named_by
    from dare_agg.offline.recipe import ModelInput, located_models
    from dare_agg.vectors.sources import CachedSource

    given = [ModelInput(**model_words(model)) for model in models]
    first, inputs = located_models(Path(base_word(base)), given)
    paths = [model.path for model in inputs]
    ground = open_base(first, paths, exclude or ())
    opened, layout = ground.checkpoint, ground.layout
    cached = CachedSource(opened.reader(layout))
    opened.check_finite(layout)
    sources = []
    said: list[str] = []
    for model in open_models(inputs, ground, cached, exclude or ()):
        if model.checkpoint is not None:
            model.checkpoint.check_finite(layout)
        sources.append(model.source)
        said += model.warnings
    with busy("measuring what changed"):
        found = diagnose_deltas(layout, sources, names=_labels(models))
    hint = bases_named_by(paths) if any("nearer to each other" in w for w in found.warnings) else ""
    more = (*ground.warnings, *said, *([hint] if hint else []))
    found = replace(found, warnings=(*found.warnings, *more))
    if report is not None:
        from dare_agg.runs.report import write_diagnosis

        words = " ".join(str(path) for path in (base, *models))
        write_diagnosis(report, found, base=base.name, command=f"dare-agg diagnose {words}")
    if json_:
        print_json(found.as_dict())
        return
    console = stdout_console()
    table = Table(
        title=f"|delta| from {base.name}, {found.parameters:,} parameters",
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
    )
    table.add_column("model", overflow="fold")
    for column in (*(f"q{q:g}" for q in QUANTILES), "max", f"> {SAFE_DELTA}", "zeros", "norm"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in found.models:
        table.add_row(
            row.name, *(_short(q) for q in row.quantiles), _short(row.largest),
            f"{row.above_small:.2%}", f"{row.zeros:.1%}", f"{row.norm:.3g}",
        )  # fmt: skip
    console.print(table)
    if len(models) > 1:
        pairs = Table(
            title="pairs: cosine, and share of elements with opposite signs",
            box=box.SIMPLE,
            padding=(0, 1, 0, 0),
        )
        for column in ("models", "cosine", "sign conflict"):
            pairs.add_column(column)
        for i, left in enumerate(found.models):
            for j in range(i + 1, len(found.models)):
                pairs.add_row(
                    f"{left.name}, {found.models[j].name}",
                    f"{found.cosine[i][j]:.3f}",
                    f"{found.conflict[i][j]:.1%}",
                )
        console.print(pairs)
        console.print(
            "models that keep any one element, on average: "
            + ", ".join(f"{n:g} at {p}" for p, n in found.survivors.items())
            + "; below 2 there is rarely a second sign, and ties does what task-arithmetic does",
            highlight=False,
        )
    if layers:
        tensors = Table(
            title="largest tensors by rms of delta", box=box.SIMPLE, padding=(0, 1, 0, 0)
        )
        tensors.add_column("tensor", overflow="fold")
        for column in ("elements", "rms", "q0.99", f"> {SAFE_DELTA}"):
            tensors.add_column(column, justify="right", no_wrap=True)
        for tensor in sorted(found.tensors, key=lambda t: -t.rms)[:layers]:
            tensors.add_row(
                tensor.name, f"{tensor.size:,}", _short(tensor.rms),
                _short(tensor.quantiles[2]), f"{tensor.above:.2%}",
            )  # fmt: skip
        console.print(tensors)
    for warning in found.warnings:
        stderr_console().print(f"warning: {warning}", style="yellow", highlight=False)
    console.print(f"safe drop rate: {found.safe_drop_rate:g} ({found.why})", highlight=False)


def _short(value: float) -> str:
    """Two digits in six characters at most, so that a table fits 80 columns."""
    text = f"{value:.2g}"
    return text if len(text) <= 6 and "e" not in text else f"{value:.1e}".replace("e-0", "e-")


def _labels(paths: list[Path]) -> list[str]:
    """File names without endings; with their folder where two are equal."""
    stems = [path.stem if path.is_file() else path.name for path in paths]
    if len(set(stems)) == len(stems):
        return stems
    return [
        f"{path.absolute().parent.name}/{stem}" for path, stem in zip(paths, stems, strict=True)
    ]

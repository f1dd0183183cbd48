"""`dare-agg statistics`: Fisher values or Gram matrices of a model, for merging."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def statistics(
    model: Annotated[Path, typer.Argument(help="Folder of a fine-tuned text classifier.")],
    data: Annotated[Path, typer.Option("--data", help="CSV, JSON Lines or Parquet file.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="A .safetensors file.")],
    kind: Annotated[str, typer.Option("--kind", help="fisher or gram (for regmean).")] = "fisher",
    text_column: Annotated[str, typer.Option("--text-column")] = "text",
    examples: Annotated[int, typer.Option("--examples", min=1)] = 256,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1)] = 16,
    length: Annotated[int, typer.Option("--length", min=1, help="Tokens at most.")] = 128,
    rule: Annotated[
        str, typer.Option("--rule", help="Fisher: true (each example) or reference (batches).")
    ] = "true",
    include_padding: Annotated[
        bool, typer.Option("--include-padding", help="Count padding in Gram matrices.")
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Collect the Fisher diagonal or the Gram matrices of MODEL on data."""
    from dare_agg.cli.busy import busy
    from dare_agg.cli.output import print_json
    from dare_agg.errors import ConfigError
    from dare_agg.offline.statistics import statistics_of_folder, write_statistics

    if out.suffix != ".safetensors":
        raise ConfigError(f"{out} is no .safetensors file; name one with -o")
    with busy(f"measuring {kind} on {data.name}"):
        arrays = statistics_of_folder(
            model, data, kind, text_column=text_column, examples=examples, batch_size=batch_size,
            length=length, rule=rule, include_padding=include_padding,
        )  # fmt: skip
    write_statistics(out, arrays, kind, {"model": model.name, "data": data.name, "rule": rule})
    elements = sum(array.size for array in arrays.values())
    if json_:
        print_json({"out": str(out), "kind": kind, "tensors": len(arrays), "elements": elements})
    else:
        typer.echo(f"{out}: {kind} of {len(arrays)} tensors, {elements:,} values")

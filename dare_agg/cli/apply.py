"""`dare-agg apply`: base and update in, tuned model out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def apply(
    base: Annotated[Path, typer.Argument(help="The base the update was made from.")],
    update: Annotated[Path, typer.Argument(help="An update file, x.dare.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="A .safetensors file or a folder.")],
    scaling: Annotated[float, typer.Option("--scaling", help="Factor of the update.")] = 1.0,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32, bfloat16 or float16. [the base's]")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            "--tokenizer",
            help="base, or a folder: whose tokenizer, template and end tokens OUT gets. [base]",
        ),
    ] = None,
    carry_code: Annotated[
        bool, typer.Option("--carry-code", help="Copy BASE's Python files and auto_map too.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Apply an update file to its BASE."""
    import math
    from dataclasses import asdict

    from dare_agg.cli.busy import busy
    from dare_agg.cli.output import print_json, print_left
    from dare_agg.errors import ConfigError
    from dare_agg.offline.diff import apply_update

    if not math.isfinite(scaling):
        raise ConfigError(f"--scaling {scaling}; a finite number is needed")
    with busy("applying the update"):
        header, carried = apply_update(
            base, update, out, scaling=scaling, dtype=dtype, overwrite=force,
            carry_code=carry_code, tokenizer=tokenizer,
        )  # fmt: skip
    layout = header.layout
    if json_:
        print_json(
            {
                "out": str(out),
                "parameters": layout.size,
                "tensors": len(layout.entries),
                "scaling": scaling,
                "base_fingerprint": header.base,
                "carried": carried.files,
                "left": [asdict(left) for left in carried.left],
            }
        )
        return
    print_left(carried.left)
    typer.echo(f"{out}: {update.name} applied to {layout.size:,} parameters")

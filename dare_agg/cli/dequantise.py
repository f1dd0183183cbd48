"""`dare-agg dequantise`: FP8 or GGUF codes in, a model of plain numbers out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def dequantise(
    model: Annotated[Path, typer.Argument(help="An FP8 model, or a GGUF file or its folder.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="A .safetensors file or a folder.")],
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            help="float32, bfloat16 or float16. [config.json's, or bfloat16; GGUF: float32]",
        ),
    ] = None,
    carry_code: Annotated[
        bool, typer.Option("--carry-code", help="Copy the model's Python files and auto_map too.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write a quantised MODEL (FP8, GGUF) in full precision, without a GPU."""
    from dataclasses import asdict

    from dare_agg.cli.busy import busy
    from dare_agg.cli.output import print_json, print_left
    from dare_agg.offline.dequantise import dequantise as write

    with busy(f"writing {model.name} in full precision"):
        made = write(model, out, dtype=dtype, overwrite=force, carry_code=carry_code)
    if json_:
        print_json(asdict(made))
        return
    print_left(made.left)
    typer.echo(f"{made.out}: {made.tensors} tensors of {made.kind} codes are {made.dtype} now")

"""`dare-agg diff`: one update file from two checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def diff(
    base: Annotated[Path, typer.Argument(help="A .safetensors file or a model folder.")],
    tuned: Annotated[
        Path, typer.Argument(help="The model tuned from it, an adapter, or MODEL+ADAPTER.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The update file, x.dare.")],
    drop_rate: Annotated[str, typer.Option("--drop-rate", help="Share dropped, 0 to 1.")] = "0.9",
    values: Annotated[
        str, typer.Option("--values", help="Value format, such as b1, i8 or f16 (docs/CODEC.md).")
    ] = "b1",
    mask: Annotated[str, typer.Option("--mask", help="stratified or bernoulli.")] = "stratified",
    seed: Annotated[int, typer.Option("--seed", help="Same models and seed, same bytes.")] = 0,
    rank: Annotated[
        int | None,
        typer.Option("--rank", min=0, help="0, 1, … with one seed: parties keep disjoint parts."),
    ] = None,
    keep_rates: Annotated[
        str,
        typer.Option(
            "--keep-rates",
            help="uniform, or own: each tensor in proportion to its change, in as many bytes.",
        ),
    ] = "uniform",
    gram: Annotated[
        int | None,
        typer.Option(
            "--gram", help="Directions of each Linear to carry along, for merges by wudi: 8, 16."
        ),
    ] = None,
    gram_bits: Annotated[
        int | None,
        typer.Option(
            "--gram-bits", help="Bits of their elements: 1, 2 (the default), 4, 8, 16 or 32."
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", help="Regular expression of tensors left out.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write the update that leads from BASE to TUNED."""
    from dare_agg.cli.busy import busy
    from dare_agg.cli.inspect import directions_words
    from dare_agg.cli.output import print_json
    from dare_agg.codec.update_file import read_update_file
    from dare_agg.errors import ConfigError
    from dare_agg.offline.diff import describe_update, write_diff
    from dare_agg.runs.words import human_bytes

    if out.suffix != ".dare":
        raise ConfigError(f"{out} does not end in .dare, by which updates are known; rename it")
    if gram_bits is not None and gram is None:
        raise ConfigError(
            f"--gram-bits {gram_bits} without --gram, the number of directions; add --gram 8"
        )
    with busy("reading both models, encoding what changed"):
        write_diff(
            base, tuned, out, drop_rate=drop_rate, values=values, mask=mask, seed=seed, rank=rank,
            exclude=tuple(exclude or ()), keep_rates=keep_rates, gram=gram,
            gram_bits=2 if gram_bits is None else gram_bits, overwrite=force,
        )  # fmt: skip
    facts = describe_update(*read_update_file(out), out.stat().st_size)
    if json_:
        print_json({"out": str(out), **facts})
        return
    typer.echo(
        f"{out}: {facts['survivors']:,} survivors of {facts['parameters']:,} parameters in "
        f"{human_bytes(facts['bytes'])}, {facts['bits_per_parameter']:.4g} bits a parameter"
        + (f"; {directions_words(facts['directions'])}" if "directions" in facts else "")
    )

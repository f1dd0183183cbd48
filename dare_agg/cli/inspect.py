"""`dare-agg inspect`: what an update file holds, or an adapter, and whether vLLM serves it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

_KEEP_RATES = {"uniform": "one for all", "own": "one a tensor, in proportion to its change"}


def inspect(
    update: Annotated[
        Path, typer.Argument(help="An update file, x.dare, or the folder of a LoRA adapter.")
    ],
    max_lora_rank: Annotated[
        int, typer.Option("--max-lora-rank", help="Of an adapter: what vLLM is started with.")
    ] = 16,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check an update file, or an adapter for vLLM, and show what it holds."""
    from rich.table import Table

    from dare_agg.cli.output import print_json, stdout_console
    from dare_agg.codec.update_file import read_update_file
    from dare_agg.errors import ConfigError
    from dare_agg.offline.adapters.folder import is_adapter
    from dare_agg.offline.adapters.serving import describe_adapter
    from dare_agg.offline.diff import describe_update
    from dare_agg.runs.words import human_bytes

    if is_adapter(update):
        about = describe_adapter(update, max_lora_rank)
        if json_:
            print_json(about)
            return
        for name, value in about.items():
            stdout_console().print(f"{name}: {value}", highlight=False, soft_wrap=True)
        return
    if update.is_dir():
        raise ConfigError(
            f"{str(update)!r} is a folder without adapter_config.json; give an update file, which "
            "dare-agg diff writes, or the folder of a LoRA adapter"
        )
    facts = describe_update(*read_update_file(update), update.stat().st_size)
    if json_:
        print_json(facts)
        return
    table = Table(title=update.name, show_header=False)
    quantiles = facts["delta_quantiles"].items()
    for name, text in {
        "parameters": f"{facts['parameters']:,} in {facts['tensors']:,} tensors",
        "survivors": f"{facts['survivors']:,} (drop rate {facts['drop_rate']:g}, {facts['mask']})",
        "keep rates": _KEEP_RATES[facts.get("keep_rates", "uniform")],
        "size": human_bytes(facts["bytes"]),
        "bits a parameter": f"{facts['bits_per_parameter']:.4g}",
        "values": facts["values"],
        "directions": directions_words(facts["directions"]) if "directions" in facts else "none",
        "base": facts["base_fingerprint"],
        "|delta|, estimated": ", ".join(f"q{q} {value:.2g}" for q, value in quantiles),
        "delta norm, estimated": f"{facts['delta_norm']:.4g}",
    }.items():
        table.add_row(name, text)
    stdout_console().print(table)


def directions_words(facts: dict[str, Any]) -> str:
    """What an update's directions are, in a few words."""
    from dare_agg.runs.words import human_bytes

    return (
        f"{facts['rank']} directions of {facts['tensors']:,} tensors in {facts['values']}, "
        f"{human_bytes(facts['bytes'])} ({facts['bits_per_parameter']:.4g} bits a parameter)"
    )

"""`dare-agg predict`: what a run's model says of texts, files or images."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dare_agg.cli.exported import exported_model
from dare_agg.errors import ConfigError, RunError

if TYPE_CHECKING:
    from rich.table import Table

_REFUSED = 3
# Labels that a table shows beside the likeliest.
_OTHERS = 2


def predict(
    run: Annotated[Path, typer.Argument(help="A run's folder, or a model folder in it.")],
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="Texts, files of texts (CSV, JSON Lines, …), images or folders of them."
        ),
    ],
    method: Annotated[
        str, typer.Option(help="Of a run of several methods, whose model. [the last]")
    ] = "",
    text_column: Annotated[
        str, typer.Option(help="Column of a file's texts. [the run's text-column]")
    ] = "",
    batch: Annotated[int, typer.Option(min=1, help="Inputs computed at once.")] = 32,
    tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens of a language model's answer.")
    ] = 64,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Label texts or images with a run's model, or have its language model answer."""
    from dare_agg.cli.output import print_json, stderr_console, stdout_console

    folder = exported_model(run, method).resolve()
    words = [str(Path(word).resolve()) if _is_place(word) else word for word in inputs]
    asked = {"inputs": words, "text_column": text_column, "batch": batch, "tokens": tokens}
    with stderr_console().status("loading the model"):
        found = _ask(folder, asked)
    if json_:
        print_json({"model": str(folder), "predictions": found})
    else:
        stdout_console().print(predictions_table(found))


def _is_place(word: str) -> bool:
    try:
        return Path(word).exists()
    except OSError:  # a text that is too long for a name
        return False


def _ask(folder: Path, asked: dict[str, Any]) -> list[dict[str, Any]]:
    """Have the app predict, in a process of its own. Raises `ConfigError` in its words."""
    from dare_agg.files.app_config import find_app
    from dare_agg.files.json_text import parse_json

    app = find_app(None)
    path = os.pathsep.join(filter(None, (str(app), os.environ.get("PYTHONPATH", ""))))
    done = subprocess.run(
        [sys.executable, "-m", "client.predict", str(folder)], cwd=app,
        env={**os.environ, "PYTHONPATH": path}, input=json.dumps(asked), capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    lines = done.stdout.strip().splitlines()
    if done.returncode == _REFUSED and lines:
        raise ConfigError(parse_json(lines[-1])["error"])
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise RunError(f"the model in {folder} could not be asked: {last.strip()}")
    return parse_json(lines[-1], most=1 << 30)["predictions"]


def predictions_table(found: Sequence[dict[str, Any]]) -> Table:
    """Input, label and probability a line; of a language model input and answer."""
    from rich.table import Table
    from rich.text import Text

    table = Table()
    table.add_column("input", overflow="fold", max_width=60)
    if found and "answer" in found[0]:
        table.add_column("answer", overflow="fold")
        for one in found:
            table.add_row(Text(str(one["input"])), Text(str(one["answer"])))
        return table
    table.add_column("label")
    table.add_column("probability", justify="right")
    table.add_column("then")
    for one in found:
        shares = sorted(one["probabilities"].items(), key=lambda pair: -pair[1])
        rest = ", ".join(f"{name} {share:.3f}" for name, share in shares[1 : 1 + _OTHERS])
        label = one["label"]
        share = f"{one['probabilities'][label]:.3f}"
        table.add_row(Text(_short(str(one["input"]))), Text(label), share, Text(rest))
    return table


def _short(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:119]}…"

"""`dare-agg demo`: one real federated fine-tuning, dense and compact, side by side."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dare_agg.cli.demo_follow import follow, last_error, stopped
from dare_agg.cli.demo_kinds import DEMOS, Demo
from dare_agg.errors import ConfigError, RunError, did_you_mean

if TYPE_CHECKING:
    from dare_agg.runs.answers import Answers
    from dare_agg.runs.report import RunRecord


def run_command(output: Path, settings: Mapping[str, Any], clients: int) -> tuple[str, ...]:
    """The `dare-agg run` command of the demo."""
    words = [sys.executable, "-m", "dare_agg.cli.main", "run"]
    words += ["--output", str(output), "--clients", str(clients)]
    for key, value in settings.items():
        words += ["--config", setting(key, value)]
    return tuple(words)


def setting(key: str, value: Any) -> str:
    """A word of a run config as the command line takes it."""
    return f'{key}="{value}"' if isinstance(value, str) else f"{key}={value}"


def fast_precision() -> str:
    """ "bfloat16" where the processor multiplies it natively, else "float32"."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "float32"
    return "bfloat16" if "avx512_bf16" in flags or "amx_bf16" in flags else "float32"


def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the run and the report.")
    ] = Path("dare-agg-demo"),
    task: Annotated[
        str, typer.Option(help="text: an encoder learns topics; language: a decoder, arithmetic.")
    ] = "text",
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Federated rounds of each method.")
    ] = None,
    clients: Annotated[int | None, typer.Option(min=2, help="Simulated clients.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of data, batches and masks.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Fine-tune a real model over simulated clients: FedAvg beside DARE, with a report."""
    from dare_agg.cli.output import fitted, print_json, stdout_console
    from dare_agg.runs.answers import read_answers
    from dare_agg.runs.report import read_run, write_report

    if task not in DEMOS:
        raise ConfigError(f"--task {task!r} is unknown{did_you_mean(task, DEMOS)}")
    kind = DEMOS[task]
    clients, rounds = clients or kind.clients, rounds or kind.rounds
    output = output.resolve()
    run_folder = output / "run"
    settings = demo_settings(kind, seed, rounds)
    started = time.monotonic()
    follow(run_folder, run_command(run_folder, settings, clients), rounds, kind.methods)
    if kind.answered:
        answer(run_folder, settings, kind)
    runs = read_run(run_folder, histograms=True)
    answers = read_answers(run_folder)
    report = write_report(
        output / "report.html",
        runs,
        title=kind.title.format(clients=clients),
        lead=kind.lead.format(clients=clients, rounds=f"{rounds} round{'s' * (rounds > 1)}"),
        command=f"dare-agg demo --task {task} --rounds {rounds} --clients {clients} --seed {seed}",
        answers=answers,
    )
    if json:
        print_json({"runs": [json_row(run) for run in runs], "report": str(report)})
        return
    console = stdout_console()
    console.print(fitted(result_table(runs), console))
    for table in answer_tables(answers):
        console.print(table)
    seconds = time.monotonic() - started
    console.print(f"Report: {report}   ({seconds:.0f} s in all)", soft_wrap=True)
    console.print("Next: dare-agg run --help   (your own model and data)")


def demo_settings(kind: Demo, seed: int, rounds: int) -> dict[str, Any]:
    """The run config of a demo."""
    own = {"seed": seed, "num-rounds": rounds, "precision": fast_precision()}
    return {"methods": ",".join(kind.methods), **kind.settings, **own}


def answer(folder: Path, settings: Mapping[str, Any], kind: Demo) -> None:
    """Have the app answer test questions with the base and with each method's model.

    Raises `RunError` with the last line of what it said when it failed.
    """
    from dare_agg.cli.output import stderr_console
    from dare_agg.files.app_config import find_app
    from dare_agg.runs.answers import ANSWERS_FILE
    from dare_agg.runs.report import TITLES

    app = find_app(None)
    models = [f"before={settings['model']}"]
    models += [f"{TITLES[name]}={folder / f'model-{name}'}" for name in kind.methods]
    words = [sys.executable, "-m", "client.answers", *models, "-o", str(folder / ANSWERS_FILE)]
    for key, value in settings.items():
        words += ["-c", setting(key, value)]
    path = os.pathsep.join(filter(None, (str(app), os.environ.get("PYTHONPATH", ""))))
    words += ["--shown", str(kind.answered)]
    log = folder.with_name("answers.log")
    with (
        stderr_console().status("answering test questions, before and after"),
        log.open("wb") as file,
    ):
        process = subprocess.Popen(
            words,
            cwd=app,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        with stopped(process):
            process.wait()
    if process.returncode != 0:
        raise RunError(
            f"the models could not answer: {last_error(log)}; the run itself is in {folder}"
        )


def answer_tables(answers: Sequence[Answers]) -> list[Any]:
    """Questions and the models' answers side by side, for people."""
    from rich.table import Table
    from rich.text import Text

    tables = []
    for one in answers:
        table = Table(title=f"Test questions ({one.data}) and answers", show_lines=True)
        for name in ("question", "wanted"):
            table.add_column(name, overflow="fold")
        for name, perplexity, match in one.models:
            told = [name, f"perplexity {perplexity:,.2f}" if perplexity is not None else ""]
            told += [f"exact match {match:.3f}" if match is not None else ""]
            table.add_column("\n".join(filter(None, told)), overflow="fold")
        for line, right in zip(one.lines, one.right, strict=True):
            styles = ["", "", *("bold green" if good else "" for good in right)]
            table.add_row(*(Text(text, style) for text, style in zip(line, styles, strict=True)))
        tables.append(table)
    return tables


def json_row(run: RunRecord) -> dict[str, Any]:
    """One run as `--json` prints it; bytes count everything, the dense head included."""
    language = {
        key: value
        for key in ("perplexity", "exact_match")
        if (value := getattr(run.rows[-1], key, None) if run.rows else None) is not None
    }
    return {
        "method": run.method,
        "accuracy": run.accuracy,
        **language,
        "rounds": len(run.rounds),
        "clients": run.clients,
        "upload_bytes_per_client_round": round(run.upload + run.head_upload),
        "download_bytes_per_client_round": round(run.download),
        "seconds": round(run.seconds, 1),
    }


def result_table(runs: list[RunRecord]) -> Any:
    """The closing table, for people."""
    from rich.table import Table

    from dare_agg.runs.report import table_columns, table_row

    table = Table(title="Federated fine-tuning, equal rounds, data and seeds")
    for index, column in enumerate(table_columns(runs)):
        table.add_column(column, justify="right" if index else "left")
    for run in runs:
        table.add_row(run.name, *table_row(run, runs))
    return table

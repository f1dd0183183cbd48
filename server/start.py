"""The start of a secure run, made beside the server: no party is asked for a model or labels.

The pretrained base is public and the head is drawn from the run's seed, so whoever has the
app makes the same start. It is made in a process of its own, since the server holds no torch.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord
from numpy.typing import NDArray

from dare_agg.checkpoint import refuse_quantised
from dare_agg.downlink.base import read_base
from dare_agg.errors import ConfigError
from dare_agg.files.json_text import parse_json
from dare_agg.flower.transport import to_record
from dare_agg.offline.adapters.folder import is_adapter
from server.adapter_start import read_adapter
from server.config import RunConfig

# The folder of the app: `client` lies beside this package.
APP = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Start:
    """What a run begins with: the first state, and the labels all agree on."""

    arrays: ArrayRecord
    labels: tuple[str, ...]


def read_initial(file: str) -> dict[str, NDArray[Any]]:
    """The arrays of a run's ``initial`` file; raises `QuantisedError` where they are codes."""
    refuse_quantised(Path(file))
    return read_base(file)


def read_start(config: RunConfig) -> dict[str, NDArray[Any]]:
    """The arrays that a run's ``initial`` means: a file of them, or an adapter to go on from.

    Raises as `read_initial` and `read_adapter`.
    """
    place = Path(config.initial)
    return read_adapter(place, config) if is_adapter(place) else read_initial(config.initial)


def secure_start(config: RunConfig, run_config: Mapping[str, Any]) -> Start:
    """The start that the run config means; its ``initial`` file where it names one.

    Raises `ConfigError` where this machine cannot make it, with what can be done.
    """
    if config.initial:
        return Start(to_record(read_initial(config.initial)), config.labels)
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "base.safetensors"
        words = [
            sys.executable,
            "-m",
            "client.base",
            "--run-config",
            "-",
            "-o",
            str(made),
            "--json",
        ]
        done = subprocess.run(
            words, cwd=APP, input=json.dumps(dict(run_config)), capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        if done.returncode:
            said = " ".join((done.stderr.strip().splitlines() or ["no word"])[-1].split())[:400]
            raise ConfigError(
                f"the start of a secure run could not be made on the server ({said}); nobody is "
                "asked for it: set labels, and make it where the model is (python -m client.base "
                "-o base.safetensors) and name it: initial"
            )
        labels = parse_json(done.stdout)["labels"]
        return Start(to_record(read_base(made)), tuple(labels))

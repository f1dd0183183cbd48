"""A job that runs a Flower app."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nvflare.job_config.api import FedJob

from dare_agg.errors import ConfigError
from dare_agg.nvflare.relay.client import FlowerRelayExecutor
from dare_agg.nvflare.relay.server import FlowerRelayController


def flower_job(
    app: Path | str,
    clients: int,
    *,
    name: str = "flower",
    run_config: dict[str, Any] | None = None,
    node_config: dict[str, Any] | None = None,
) -> FedJob:
    """A job that runs the Flower app in a folder on the server and ``clients`` sites.

    The folder has to be on the server, not in the job: Flower itself hands the app to the sites.
    """
    folder = Path(app).resolve()
    if not (folder / "pyproject.toml").is_file():
        raise ConfigError(
            f"{folder} holds no pyproject.toml; name the folder of a Flower app, the one that "
            "`flwr run` is given"
        )
    job = FedJob(name=name, min_clients=clients)
    job.to_server(FlowerRelayController(str(folder), run_config))
    job.to_clients(FlowerRelayExecutor(node_config))
    return job

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
    """A job that brings the Flower app of a folder and runs it at the server and ``clients`` sites.

    The app is code of the job's author: NVFlare asks the sites' policies for the right "byoc".
    """
    folder = Path(app).resolve()
    if not (folder / "pyproject.toml").is_file():
        raise ConfigError(
            f"{folder} holds no pyproject.toml; name the folder of a Flower app, the one that "
            "`flwr run` is given"
        )
    job = FedJob(name=name, min_clients=clients)
    # The package is installed everywhere, and not sent along.
    job.set_app_packages(["dare_agg"])
    job.to_server(FlowerRelayController("", run_config))
    job.to_server(str(folder))
    job.to_clients(FlowerRelayExecutor(node_config))
    job.to_clients(str(folder))
    return job

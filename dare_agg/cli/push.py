"""`dare-agg push`: a run's model onto a hub, with its card and without this machine's paths."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from dare_agg.cli.exported import PROVENANCE, exported_model
from dare_agg.errors import ConfigError, RunError

_ON = {"1", "TRUE", "YES", "ON"}


def push(
    run: Annotated[Path, typer.Argument(help="A run's folder, or a model folder in it.")],
    name: Annotated[str, typer.Argument(help="Where it goes: OWNER/NAME.")],
    method: Annotated[
        str, typer.Option(help="Of a run of several methods, whose model. [the last]")
    ] = "",
    private: Annotated[
        bool, typer.Option("--private", help="A new one is seen by you alone.")
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Put a run's model onto the Hugging Face hub (HF_ENDPOINT names another)."""
    from dare_agg.cli.output import print_json, stderr_console

    folder = exported_model(run, method)
    owner, _, short = name.partition("/")
    if not owner or not short or "/" in short:
        raise ConfigError(f"{name!r} is no name on a hub; write OWNER/NAME, such as me/reviews")
    with stderr_console().status(f"sending {folder.name} to {name}"):
        address = push_folder(folder, name, private=private)
    if json_:
        print_json({"model": str(folder.resolve()), "name": name, "url": address})
    else:
        typer.echo(f"{name}: {address}")


def push_folder(folder: Path, name: str, *, private: bool = False) -> str:
    """Send a model's folder to a hub; returns its address.

    Raises `ConfigError` where no hub may be asked or there is no token, `RunError` where the hub
    cannot be reached or refuses.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError

    if os.environ.get("HF_HUB_OFFLINE", "").upper() in _ON:
        raise ConfigError("no hub is asked (HF_HUB_OFFLINE is set); unset it to push")
    token = get_token()
    if not token:
        raise ConfigError("there is no token for the hub; make one there, then: hf auth login")
    with tempfile.TemporaryDirectory() as aside:
        clean = Path(aside) / "model"
        shutil.copytree(folder, clean)
        for file in (clean / PROVENANCE, clean / "adapter" / "adapter_config.json"):
            if file.is_file():
                _forget_paths(file)
        api = HfApi(token=token)
        try:
            address = api.create_repo(name, private=private or None, exist_ok=True)
            api.upload_folder(
                repo_id=name, folder_path=clean, commit_message="A model of dare-agg run"
            )
        except HfHubHTTPError as error:
            said = " ".join(str(error).split())[:200]
            raise RunError(
                f"the hub refused {name}: {said}; check the name, and that the token may write"
            ) from error
        except Exception as error:  # of a socket, a name server, a proxy
            said = " ".join(str(error).split())[:200]
            raise RunError(
                f"the hub could not be reached ({type(error).__name__}: {said}); nothing or a part "
                "was sent: try again where there is a network"
            ) from error
    return str(address)


def _forget_paths(file: Path) -> None:
    from dare_agg.files.json_text import read_json
    from dare_agg.runs.words import without_paths

    file.write_text(json.dumps(without_paths(read_json(file)), indent=1) + "\n", encoding="utf-8")

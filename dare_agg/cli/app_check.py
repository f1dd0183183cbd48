"""A run config is checked before Flower starts: its words here, the rest by the app itself.

An app names functions of the run config (a dict, which they refuse with a `DareError`) in its
pyproject.toml; they run as the app's own code, in a process of their own with the app's folder
first on the path::

    [tool.dare-agg]
    check = ["server.check:check"]          # before every run
    check-here = ["client.check:check"]     # where this machine is also the clients'
    outlook = ["server.outlook:outlook"]    # for --dry-run: of the run config and what was found
    outlook-here = ["client.outlook:outlook"]
    [tool.dare-agg.absent]
    gpus = "an option of the command: dare-agg run --gpus 0.5"
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dare_agg.errors import ConfigError, DareError, did_you_mean
from dare_agg.files.app_config import Scalar, app_project
from dare_agg.files.json_text import parse_json

_REFUSED = 3


def check_words(
    given: Mapping[str, Any], usual: Mapping[str, Scalar], absent: Mapping[str, str]
) -> None:
    """Refuse keys that an app does not have, and values that no run config can hold.

    ``usual`` are the app's defaults, ``absent`` the keys of which it says why it has none.
    Raises `ConfigError` with that, else with the nearest key.
    """
    for key, value in given.items():
        if not isinstance(value, bool | int | float | str):
            raise ConfigError(
                f"run config {key} = {value!r}: numbers, texts, true and false are possible; "
                f'write a list as one text: {key}="a,b"'
            )
        if key in absent:
            raise ConfigError(f"run config key {key!r}: {absent[key]}")
        if key not in usual:
            raise ConfigError(f"run config key {key!r} is unknown{did_you_mean(key, usual)}")


def check_kinds(given: Mapping[str, Any], usual: Mapping[str, Scalar]) -> None:
    """Refuse what is no number or no truth value where the app's default is one."""
    for key, value in given.items():
        default = usual[key]
        switch, number = isinstance(default, bool), isinstance(default, int | float)
        fits = isinstance(value, bool) if switch else not isinstance(value, bool | str)
        if number and not fits:
            due = "true or false" if switch else "a number"
            raise ConfigError(f"run config {key} = {value!r}: {due} is needed, as {default!r} is")


def ask_outlook(app: Path, settings: Mapping[str, Scalar], *, here: bool) -> dict[str, Any]:
    """Have the app say what a run would do: what its functions return, one after another.

    Empty for an app that has none. Raises `ConfigError` in the app's words.
    """
    words = app_project(app).get("tool", {}).get("dare-agg", {})
    looks = [*(words.get("outlook-here", ()) if here else ()), *words.get("outlook", ())]
    return _ask(app, settings, ["--outlook", *looks]) if looks else {}


def ask_app(app: Path, settings: Mapping[str, Scalar], *, here: bool) -> bool:
    """Have the app check a run config; returns whether it has a check of its own.

    ``here`` says that clients run on this machine too. Raises `ConfigError` in the app's words.
    """
    words = app_project(app).get("tool", {}).get("dare-agg", {})
    checks = [*words.get("check", ()), *(words.get("check-here", ()) if here else ())]
    if not checks:
        return False
    _ask(app, settings, checks)
    return True


def _ask(app: Path, settings: Mapping[str, Scalar], checks: list[str]) -> Any:
    """Run functions of the app in a process of its own; returns what it prints."""
    path = os.pathsep.join(filter(None, (str(app), os.environ.get("PYTHONPATH", ""))))
    done = subprocess.run(
        [sys.executable, "-m", __name__, *checks], cwd=app, env={**os.environ, "PYTHONPATH": path},
        input=json.dumps(settings), capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode == _REFUSED:
        raise ConfigError(str(parse_json(done.stdout.strip().splitlines()[-1])))
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise ConfigError(f"the app in {app} cannot check a run config: {last.strip()}")
    said = done.stdout.strip().splitlines()
    return parse_json(said[-1], most=1 << 28) if said else None


def _main(checks: list[str]) -> int:
    """Run the checks on the config of standard input; what they refuse goes to standard output."""
    settings = parse_json(sys.stdin.read())
    looks = checks[:1] == ["--outlook"]
    found: dict[str, Any] = {}
    for name in checks[1:] if looks else checks:
        module, _, function = name.partition(":")
        try:
            call = getattr(importlib.import_module(module), function)
            if looks:
                found |= call(settings, found)
            else:
                call(settings)
        except DareError as error:
            print(json.dumps(str(error)))
            return _REFUSED
    if looks:
        print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))

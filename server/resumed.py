"""A resumed run: what of its config may be another than it was begun with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dare_agg.errors import ConfigError
from dare_agg.runs.claim import run_state
from dare_agg.runs.ending import COMPLETED
from server.config import DEFAULTS, RunConfig, kebab
from server.reading import read_config, settled

# What a resumed run may be told anew: how long, how patiently and on what it goes on, who takes
# part and what is shown. All else decides what it computes.
_MAY_CHANGE = frozenset(
    {
        "num-rounds", "min-clients", "min-replies", "max-empty-rounds", "deadline", "node-timeout",
        "identities", "secure-stage-seconds", "secure-roster", "save-model", "output", "resume",
        "prometheus-port", "prometheus-host", "verify-every", "device", "threads", "arrivals",
    }
)  # fmt: skip
_MOST_SHOWN = 60


def check_resumed(config: RunConfig, folder: Path) -> None:
    """Refuse to resume the run in ``folder``, whose config its run.json has, as another one.

    Raises `ConfigError` with each key that differs. A key that is younger than the run had its
    default.
    """
    state = run_state(folder)
    stored = state.get("config")
    if not isinstance(stored, dict):  # whether there is a run at all, `claim` says
        return
    begun, usual = _begun_with(stored), _plain(read_config({}))
    changed = {
        key: new
        for key, new in _plain(config).items()
        if key not in _MAY_CHANGE and begun[key] != new
    }
    if not changed:
        return
    different = [f"{key} {_shown(begun[key])} → {_shown(new)}" for key, new in changed.items()]
    these = "these" if len(different) > 1 else "this"
    go_on = f"leave {these} out to go on as before, or begin another run"
    if any(new == usual[key] for key, new in changed.items()):
        # What a run was begun with is not always today's default.
        go_on = f"set {these} as before to go on, or begin another run"
    if state.get("status") == COMPLETED:
        go_on = "the run is finished: begin another one"
    raise ConfigError(
        f"{folder} is to be resumed with another config than it was begun with: "
        f"{', '.join(different)}; {go_on}: --output (output in a run config)"
    )


def _begun_with(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The config that run.json holds; of a run interrupted early only what was set."""
    known = {kebab(name) for name in RunConfig.model_fields}
    words = {
        key: ",".join(map(str, value)) if isinstance(value, list) else value
        for key, value in stored.items()
        if key in known
    }
    try:
        return _plain(RunConfig.model_validate(settled({**DEFAULTS, **words})))
    except ValidationError:  # values of another version
        return _plain(RunConfig.model_validate(settled(DEFAULTS))) | dict(stored)


def _plain(config: RunConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", by_alias=True)


def _shown(value: Any) -> str:
    text = ",".join(map(str, value)) if isinstance(value, list) else value
    shown = repr(text)
    return shown if len(shown) <= _MOST_SHOWN else f"…{shown[1 - _MOST_SHOWN :]}"

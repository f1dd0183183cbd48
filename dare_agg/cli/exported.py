"""Which exported model a command means: a folder of one, or a run's folder with several."""

from __future__ import annotations

import sys
from pathlib import Path

from dare_agg.errors import ConfigError, did_you_mean
from dare_agg.runs.claim import run_state
from dare_agg.runs.ending import FAILED, INTERRUPTED, RUNNING

_PREFIX = "model-"
PROVENANCE = "provenance.json"


def exported_model(run: Path, method: str = "") -> Path:
    """The model's folder that ``run`` means; of a run with several, ``method`` or the last.

    Which one was taken is said on stderr. Raises `ConfigError` where there is none.
    """
    if (run / PROVENANCE).is_file() and not method:
        return run
    found = {
        path.name.removeprefix(_PREFIX): path
        for path in sorted(run.glob(f"{_PREFIX}*"), key=lambda p: p.stat().st_mtime)
        if (path / PROVENANCE).is_file()
    }
    if not found:
        raise ConfigError(f"{run} holds no model of a run: {_why_none(run)}")
    if method:
        if method not in found:
            raise ConfigError(f"{run} has no model of {method!r}{did_you_mean(method, found)}")
        return found[method]
    path = list(found.values())[-1]
    if len(found) > 1:
        sys.stderr.write(f"{path.name} of {', '.join(found)}; --method chooses\n")
    return path


def _why_none(run: Path) -> str:
    if not run.is_dir():
        return "there is no such folder; give a run's folder"
    if parties := sorted(path.parent for path in run.glob(f"parties/*/{PROVENANCE}")):
        return f"it is a merge; its parties have theirs: give one, such as {parties[0]}"
    status = run_state(run).get("status")
    if status == RUNNING:
        return "it is running, and a model is written when its method has ended"
    if status in (FAILED, INTERRUPTED):
        ended = "failed" if status == FAILED else "was interrupted"
        return f"it {ended} before one was written; go on with: dare-agg run --resume {run}"
    return "save-model was off, or it is not finished; give a run's folder"

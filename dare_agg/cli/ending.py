"""How a followed run ends: nothing of it goes on, and run.json says how."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dare_agg.cli import signals
from dare_agg.errors import StateError, plain_line
from dare_agg.runs.ending import FAILED, INTERRUPTED, note_end


@contextlib.contextmanager
def ended_whole(folder: Path, home: Path, config: Mapping[str, Any]) -> Iterator[None]:
    """End whatever the body started with ``home`` as FLWR_HOME, also when it is interrupted.

    ``config`` are the settings the run was begun with. A second signal ends everything at once.
    """
    from dare_agg.flower.processes.ending import end_family

    def at_once() -> None:
        end_family(home, kindly=0)
        note(folder, INTERRUPTED, "interrupted", config)

    with signals.ending(at_once, f"go on with: dare-agg run --resume {folder}"):
        try:
            yield
        except KeyboardInterrupt:
            end_family(home)
            note(folder, INTERRUPTED, "interrupted", config)
            raise
        finally:
            with signals.held():
                end_family(home)


def note(folder: Path, status: str, error: str, config: Mapping[str, Any]) -> None:
    """`note_end`, unless the disk is full: what ended the run is said all the same."""
    with contextlib.suppress(StateError):
        note_end(folder, status, error, config)


def note_failure(folder: Path, status: str, detail: str) -> None:
    """Have run.json say that Flower ended a run, where the run itself could not."""
    stopped = status.endswith(":stopped")
    note(folder, INTERRUPTED if stopped else FAILED, detail or status, {})


# What Flower's processes put before what an app raised, and where its simulation says what ended
# it when no app did: its own last word is that there was an error.
_FLOWERS = re.compile(r"(?:\w+ )+failed with exception: ")
_NO_CAUSE = "An error was encountered. Ending simulation."
_CAUSE = re.compile(r"^ERROR\s*:\s*An exception occurr?ed ?!! (.*)", re.MULTILINE)


def failure(detail: str, now: Mapping[str, Any], before: Mapping[str, Any], log: Path) -> str:
    """Why a run failed: its own word, else Flower's ``detail``, or what the log has for it.

    ``now`` and ``before`` are what run.json says and said; a run that did not come to write it
    has no word there.
    """
    own = now.get("error") if now.get("token") != before.get("token") else None
    said = str(own or _FLOWERS.sub("", detail, count=1))
    if said == _NO_CAUSE:
        with contextlib.suppress(OSError):
            causes = _CAUSE.findall(log.read_text(encoding="utf-8", errors="replace"))
            said = next((one for one in reversed(causes) if "crashed" not in one), said)
    return plain_line(said)

"""Texts that a chat template makes of conversations, made where it can take no more than told.

One process for each of ours runs templates (`client.instructions.render_process`): it starts
with the first, in about a second, and is started anew where it was stopped.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from client.instructions.conversations import Conversation
from client.instructions.render_process import MOST_COST, MOST_LINE, SECONDS
from dare_agg.errors import ConfigError
from dare_agg.files.json_text import parse_json

# By the clock, for a machine that is busy or cannot count computing.
_PATIENCE = 10 * SECONDS

_lock = threading.Lock()
_running: dict[int, subprocess.Popen[bytes]] = {}  # by the process that started it


class Rendered(NamedTuple):
    """A text and its stretches of answers by ``{% generation %}``, or why there is none."""

    text: str = ""
    spans: tuple[tuple[int, int], ...] = ()
    refusal: str = ""


def render(
    template: str,
    words: Mapping[str, str],
    asked: Sequence[tuple[Conversation, bool]],
    *,
    blocks: bool = False,
) -> list[Rendered]:
    """What a template makes of each (turns, whether the model is asked to speak).

    ``words`` are the special tokens that it may write. Raises `ConfigError` where it takes more
    than `SECONDS` of computing for all of them.
    """
    request = {
        "seconds": SECONDS,
        "template": template,
        "words": dict(words),
        "blocks": blocks,
        "asked": list(asked),
    }
    line = json.dumps(request).encode() + b"\n"
    with _lock:
        answer = _answer(line)
    if not answer.endswith(b"\n"):
        raise ConfigError(
            f"the model's chat template was stopped: it computes for more than {SECONDS} s, or "
            f"needs too much memory, over {len(asked)} conversations; take another model, or put "
            "a chat_template.jinja into its folder that ends"
        )
    found = parse_json(answer, most=MOST_LINE, cost=MOST_COST, any_text=True)
    return [_read(one) for one in found]


def _read(one: Mapping[str, object]) -> Rendered:
    if "refusal" in one:
        return Rendered(refusal=str(one["refusal"]))
    spans: object = one["spans"]
    assert isinstance(spans, list)
    return Rendered(str(one["text"]), tuple((int(lo), int(hi)) for lo, hi in spans))


def _answer(line: bytes) -> bytes:
    """The process's answer; without its line end where it was stopped before it."""
    process = _process()
    assert process.stdin is not None and process.stdout is not None
    clock = threading.Timer(_PATIENCE, process.kill)
    clock.daemon = True
    clock.start()
    try:
        process.stdin.write(line)
        process.stdin.flush()
        answer = process.stdout.readline(MOST_LINE)
    except OSError:
        answer = b""
    finally:
        clock.cancel()
    if not answer.endswith(b"\n"):
        _end()
    return answer


def _end() -> None:
    """Stop the process of this one, where one runs."""
    process = _running.pop(os.getpid(), None)
    if process is not None:
        process.kill()
        with contextlib.suppress(OSError):  # what could not be sent
            process.__exit__(None, None, None)


atexit.register(_end)


def _process() -> subprocess.Popen[bytes]:
    """The running process of this one; never one of a parent's, whose pipes are shared."""
    process = _running.get(os.getpid())
    if process is None or process.poll() is not None:
        _end()
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(part or str(Path.cwd()) for part in sys.path),
            "OMP_NUM_THREADS": "1",
            "TRANSFORMERS_VERBOSITY": "error",
        }
        _running.clear()
        process = _running[os.getpid()] = subprocess.Popen(
            [sys.executable, "-P", "-m", "client.instructions.render_process"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
    return process

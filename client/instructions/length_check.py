"""Conversations counted in tokens before anything starts, in a process that loads no torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from client.config import TaskConfig
from dare_agg.errors import ConfigError
from dare_agg.files.json_text import parse_json

SECONDS = 60.0  # for a few megabytes


def refuse_cut(config: TaskConfig) -> None:
    """Raise `ConfigError` where tokens tell that clients will learn nothing or cannot answer.

    What this process cannot tell in `SECONDS`, such as a tokenizer that does not load without
    torch, clients say themselves.
    """
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(part or str(Path.cwd()) for part in sys.path)
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "client.instructions.length_count"],
            input=json.dumps(asdict(config)).encode(),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=SECONDS,
            check=True,
        )
        said = parse_json(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return
    if isinstance(said, str) and said:
        raise ConfigError(said)

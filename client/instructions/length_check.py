"""Conversations counted in tokens before anything starts, in a process that loads no torch.

``python -m client.instructions.length_check``: a configuration as JSON in, a refusal out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from client.config import TaskConfig, configure
from dare_agg.errors import ConfigError, DareError
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
            [sys.executable, "-P", "-m", "client.instructions.length_check"],
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


def main() -> None:
    """Print why the configuration's conversations are refused, "" where they are not."""
    sys.modules["torch"] = None  # type: ignore[assignment]
    from client.instructions.template import open_tokenizer
    from client.tasks.instructions import load_examples

    config = configure(**parse_json(sys.stdin.buffer.read()))
    open_tokenizer(config.model)  # what is wrong with it, clients say
    try:
        load_examples(config)
    except DareError as error:
        print(json.dumps(str(error)))
    else:
        print(json.dumps(""))


if __name__ == "__main__":
    main()

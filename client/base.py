"""The base of a run as a file, for a server whose clients are behind slow links.

``python -m client.base -o base.safetensors [key=value ...]`` makes what every client makes for
itself (the public encoder and a seeded head) from the app's config and the given keys. Name
the file as the run's ``initial``: then no whole model travels at all.
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from pathlib import Path

from client.config import ConfigValue, task_config
from client.tasks import build_task
from dare_agg.downlink.base import write_base
from dare_agg.errors import DareError
from dare_agg.files.atomic import write_atomically


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m client.base", description=__doc__)
    parser.add_argument("keys", nargs="*", help="run config as key=value")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    run: dict[str, ConfigValue] = {}
    try:
        for pair in options.keys:
            key, _, value = pair.partition("=")
            try:
                run[key] = tomllib.loads(f"x = {value}")["x"]
            except tomllib.TOMLDecodeError:
                run[key] = value
        state = build_task(task_config(run, {})).initial_state()
        write_atomically(options.output, (write_base(state),))
    except DareError as error:
        sys.exit(f"error: {error}")
    print(f"{options.output}: {len(state)} tensors, {options.output.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()

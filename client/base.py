"""The base of a run as a file, for a server whose clients are behind slow links.

``python -m client.base -o base.safetensors [key=value ...]`` makes what every client makes for
itself (the public encoder and a seeded head) from the app's config and the given keys. Name
the file as the run's ``initial``: then no whole model travels at all. With ``labels`` set the
data need not be on this machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from pathlib import Path

import numpy as np

from client.config import ConfigValue, task_config
from client.rows import Data, Rows
from client.training import build_task
from dare_agg.downlink.base import write_base
from dare_agg.errors import DareError
from dare_agg.files.atomic import replace_file
from dare_agg.files.json_text import parse_json, read_json


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m client.base", description=__doc__)
    parser.add_argument("keys", nargs="*", help="run config as key=value")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--run-config", help="the whole run config as JSON, - for standard input")
    parser.add_argument("--json", action="store_true", help="print labels and sizes as JSON")
    options = parser.parse_args()
    run: dict[str, ConfigValue] = {}
    try:
        if options.run_config:
            given = options.run_config
            run = parse_json(sys.stdin.read()) if given == "-" else read_json(Path(given))
        for pair in options.keys:
            key, _, value = pair.partition("=")
            try:
                run[key] = tomllib.loads(f"x = {value}")["x"]
            except tomllib.TOMLDecodeError:
                run[key] = value
        config = task_config(run, {})
        task = build_task(config, _no_rows(config.labels) if config.labels else None)
        state = task.initial_state()
        replace_file(options.output, (write_base(state),))
    except (DareError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    if options.json:
        print(json.dumps({"labels": list(task.data.label_names), "tensors": len(state)}))
        return
    print(f"{options.output}: {len(state)} tensors, {options.output.stat().st_size:,} bytes")


def _no_rows(labels: tuple[str, ...]) -> Data:
    """Data of which only the labels are known: enough for the shape of a head."""
    empty = Rows((), np.empty(0, np.int64), ())
    return Data("labels alone", empty, empty, labels)


if __name__ == "__main__":
    main()

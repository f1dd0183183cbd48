"""What models answer to the test questions of instruction data, side by side, as a file.

``python -m client.answers before=smollm2 after=runs/x/model-fedavg -o answers.json [-c key=value]``
takes the run config's words for the data; a report shows the file that lies in its run's folder.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from client.config import DEFAULTS, ConfigValue, TaskConfig, data_sources, task_config
from client.instructions.conversations import last_exchange
from client.instructions.generation import exact_match, generate_answers
from client.instructions.template import open_tokenizer
from client.training import build_task
from dare_agg.cli.run_config import parse_overrides
from dare_agg.errors import ConfigError, DareError
from dare_agg.files.atomic import replace_file
from dare_agg.runs.answers import ANSWERS_FILE

_TOGETHER = 16  # rows that are answered at once


def answer(config: TaskConfig, models: Mapping[str, str], shown: int) -> dict[str, Any]:
    """Questions, wanted answers and, by name, each model's answers, loss and exact match.

    Loss is on all test rows of the configuration, exact match on its first ``generate_rows``, of
    which ``shown`` are kept as text. Raises `ConfigError` for data that are no conversations.
    """
    found: dict[str, Any] = {"data": config.data, "questions": [], "wanted": [], "models": []}
    count = max(shown, config.generate_rows)
    for name, path in models.items():
        own = replace(config, model=path, train="full", generate_rows=0)
        task = build_task(own)
        if not task.kind.by_label:
            raise ConfigError(f"data {config.data!r} holds no conversations; name instruction data")
        pairs = [last_exchange(row.conversation) for row in task.test_rows.inputs[:count]]
        if not pairs:
            raise ConfigError(f"data {config.data!r} has no test rows; leave held-out out")
        metrics = task.evaluate(task.initial)
        network, _ = task.network(task.initial, "test")
        answers = generate_answers(
            network,
            open_tokenizer(path),
            [turns for turns, _ in pairs],
            most_tokens=config.generate_tokens,
            batch=_TOGETHER,
        )
        wanted = [text for _, text in pairs]
        right = [
            exact_match([given], [due], config.answer_form) == 1
            for given, due in zip(answers, wanted, strict=True)
        ]
        found["models"].append(
            {
                "name": name,
                "loss": metrics["loss"],
                "exact-match": sum(right) / len(right),
                "answers": answers[:shown],
                "right": right[:shown],
            }
        )
        found["questions"] = [_question(turns) for turns, _ in pairs[:shown]]
        found["wanted"] = wanted[:shown]
    return {**found, "rows": len(task.test_rows), "answered": len(pairs)}


def _question(turns: Any) -> str:
    """The turns before an answer as people read them; a system prompt is not shown."""
    said = [(role, content) for role, content in turns if role != "system"]
    if len(said) == 1:
        return said[0][1]
    return "\n".join(f"{role}: {content}" for role, content in said)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m client.answers", description=__doc__)
    parser.add_argument("models", nargs="+", help="models as NAME=MODEL", metavar="NAME=MODEL")
    parser.add_argument("-o", "--output", type=Path, default=Path(ANSWERS_FILE))
    parser.add_argument("-c", "--config", action="append", default=[], help="run config key=value")
    parser.add_argument("--shown", type=int, default=6, help="answers that are kept as text")
    options = parser.parse_args()
    try:
        run = parse_overrides(options.config)
        models = {}
        for pair in options.models:
            name, mark, path = pair.partition("=")
            if not mark or not path:
                raise ConfigError(f"{pair!r} names no model; write NAME=MODEL, before=smollm2")
            models[name] = path
        found = [answer(one, models, max(1, options.shown)) for one in _configurations(run)]
        text = json.dumps({"sections": found}, indent=1) + "\n"
        replace_file(options.output, (text.encode(),))
    except (DareError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    for section in found:
        for one in section["models"]:
            perplexity, match = np.exp(min(one["loss"], 700.0)), one["exact-match"]
            said = f"perplexity {perplexity:,.2f}, exact match {match:.3f}"
            print(f"{section['data']}, {one['name']}: {said}")
    print(options.output)


def _configurations(run: Mapping[str, ConfigValue]) -> list[TaskConfig]:
    """One configuration for each source that the run config's ``data`` names."""
    sources = data_sources(str(run.get("data", DEFAULTS["data"])))
    nodes = ({"partition-id": n, "num-partitions": len(sources)} for n in range(len(sources)))
    return [task_config(run, node) for node in nodes]


if __name__ == "__main__":
    main()

"""Counts conversations in tokens, without torch; `client.instructions.length_check` starts it.

``python -m client.instructions.length_count``: a configuration as JSON in, a refusal out.
"""

from __future__ import annotations

import json
import sys

from client.config import configure
from dare_agg.errors import DareError
from dare_agg.files.json_text import parse_json


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

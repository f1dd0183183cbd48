"""The program that runs chat templates: ``python -m client.instructions.render_process``.

A line of JSON in, a line out. A template comes with a model and is a program: its loops, its
texts and its powers of numbers have no end of their own, so they run here, where the system holds
each request to `SECONDS` of computing and the process to `MOST_BYTES` of memory. It ends with its
input.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping
from typing import Any

from dare_agg.files.json_text import parse_json

SECONDS = 20  # of computing, of one request
MOST_BYTES = 1 << 30  # of addresses
MOST_LINE = 1 << 29
MOST_COST = 1 << 24
# A text is at most so many times as long as its turns, beside what a template says of itself.
MOST_TIMES, MOST_BESIDE = 16, 1 << 20


def main() -> None:
    """Answer requests until the input ends."""
    # Rendering needs neither; torch alone takes seconds to load.
    sys.modules["torch"] = sys.modules["PIL"] = None  # type: ignore[assignment]
    answers, sys.stdout = sys.stdout, sys.stderr
    from transformers.utils.chat_template_utils import render_jinja_template

    _bound("RLIMIT_AS", MOST_BYTES)
    for line in sys.stdin.buffer:
        request = parse_json(line, most=MOST_LINE, cost=MOST_COST, any_text=True)
        _bound("RLIMIT_CPU", request["seconds"])
        found = [_rendered(render_jinja_template, request, *one) for one in request["asked"]]
        answers.write(json.dumps(found) + "\n")
        answers.flush()


def _bound(name: str, most: int) -> None:
    """Have the system stop this process beyond ``most``: bytes, or seconds from now."""
    try:
        import resource
    except ImportError:  # Windows: who asks stops it by the clock
        return
    if name == "RLIMIT_CPU":
        used = resource.getrusage(resource.RUSAGE_SELF)
        most += int(used.ru_utime + used.ru_stime)
    which = getattr(resource, name)
    _, hard = resource.getrlimit(which)
    with contextlib.suppress(ValueError, OSError):  # a lower bound is set already
        resource.setrlimit(which, (most, hard))


def _rendered(render: Any, request: Mapping[str, Any], turns: Any, ask: bool) -> dict[str, Any]:
    """The text of turns and where it holds answers, or why the template refuses them."""
    messages = [{"role": role, "content": content} for role, content in turns]
    most = MOST_BESIDE + MOST_TIMES * sum(len(content) for _, content in turns)
    try:
        if not messages:
            raise ValueError("there is no turn")
        (text,), spans = render(
            [messages],
            chat_template=request["template"],
            add_generation_prompt=ask,
            return_assistant_tokens_mask=request["blocks"],
            **request["words"],
        )
        if len(text) > most:
            return {"refusal": f"it makes {len(text)} characters of them, above {most}"}
        return {"text": text, "spans": spans[0] if spans else []}
    except Exception as error:
        return {"refusal": str(error)[:1000] or type(error).__name__}


if __name__ == "__main__":
    main()

"""The page's parts as one file, or one by one for a server: style, scripts, frame.

A browser fetches nothing for it: the file's policy (Content-Security-Policy) admits this very
style and these very scripts by their hashes, and no address at all.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent
SCRIPTS = ("dom.js", "chart.js", "curves.js", "page.js")
STYLE = "page.css"
# What is drawn without scripts.
_STILL = """<header><h1>{title}</h1><p class="lead">{lead}</p></header>
<noscript><section><p>Curves need JavaScript; nothing is fetched for them.</p>{table}</section>\
</noscript>"""
_FRAME = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{title} · dare-agg</title>
{style}
</head>
<body>
<a class="skip" href="#page">Skip to the results</a>
<main id="page">
{still}
</main>
{script}
</body>
</html>
"""


@cache
def part(name: str) -> str:
    """The text of a part that stands beside this file."""
    return (_HERE / name).read_text(encoding="utf-8")


def script(*more: str) -> str:
    """The scripts as one, those in ``more`` last; they share one scope of their own."""
    return "'use strict';\n(() => {\n" + "".join(map(part, (*SCRIPTS, *more))) + "})();\n"


def whole_page(facts: Mapping[str, Any]) -> str:
    """One HTML file of the page's facts, see `dare_agg.runs.report.facts`."""
    style, code = part(STYLE), script("still.js")
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(code)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    data = f'<script type="application/json" id="facts">{_in_script(facts)}</script>\n'
    return _frame(
        facts,
        policy=policy,
        style=f"<style>{style}</style>",
        script=f"{data}<script>{code}</script>",
    )


def live_frame(policy: str) -> str:
    """The HTML page that a server sends once; the rest of it comes by its own addresses."""
    return _frame(
        {"title": "A run, live", "lead": ""},
        policy=policy,
        style=f'<link rel="stylesheet" href="{STYLE}">',
        script='<script src="page.js"></script>',
    )


def _frame(facts: Mapping[str, Any], *, policy: str, style: str, script: str) -> str:
    title, lead = (html.escape(str(facts[key])) for key in ("title", "lead"))
    table = _still_table(facts["table"]) if "table" in facts else ""
    still = _STILL.format(title=title, lead=lead, table=table)
    return _FRAME.format(
        policy=html.escape(policy), title=title, style=style, script=script, still=still
    )


def _still_table(table: Mapping[str, Any]) -> str:
    rows = [table["columns"], *table["rows"]]
    return (
        "<table>"
        + "".join(
            "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>"
            for row in rows
        )
        + "</table>"
    )


def _in_script(value: Any) -> str:
    """JSON that no word in it can end the element or begin a comment with."""
    text = json.dumps(value, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

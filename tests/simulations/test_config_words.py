"""Every word has its row: none is read that docs/CONFIG.md does not have."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from client.config import NODE_KEYS, TaskConfig
from client.config import NODE_WORDS as CLIENT_WORDS
from dare_agg.cli.examples import EXAMPLES
from dare_agg.files.app_config import app_defaults, find_app, key_groups
from dare_agg.files.environment import VARIABLES
from dare_agg.flower.node_words import NODE_WORDS
from server.config import RunConfig
from simulations.pages.config_words import main, meanings, page, values_of

ROOT = Path(__file__).resolve().parents[2]
FILES = [path for room in ("dare_agg", "server", "client") for path in (ROOT / room).rglob("*.py")]
NODES = {"node", "node_config"}


def read_keys(tree: ast.AST) -> Iterator[str]:
    """Keys that code reads of a node's config: node.get("x"), node["x"], "x" in node, _number."""
    for part in ast.walk(tree):
        if isinstance(part, ast.Subscript) and _of_node(part.value):
            yield from _text(part.slice)
        elif isinstance(part, ast.Compare) and any(map(_of_node, part.comparators)):
            yield from _text(part.left)
        elif isinstance(part, ast.Call):
            function = part.func
            if isinstance(function, ast.Attribute) and _of_node(function.value):
                yield from (text for one in part.args[:1] for text in _text(one))
            elif len(part.args) > 1 and _of_node(part.args[0]):
                yield from _text(part.args[1])


def _of_node(part: ast.AST) -> bool:
    name = part.attr if isinstance(part, ast.Attribute) else getattr(part, "id", "")
    return name in NODES


def _text(part: ast.AST) -> Iterator[str]:
    value = part.value if isinstance(part, ast.Constant) else None
    if isinstance(value, str) and re.fullmatch(r"[a-z]+(-[a-z]+)*", value):
        yield value


def test_every_word_of_a_node_that_is_read_has_a_row() -> None:
    read = {key for path in FILES for key in read_keys(ast.parse(path.read_text(encoding="utf-8")))}
    assert {"client-name", "secure-min-norm", "data-path", "uplink-kbit-s"} <= read
    assert not read - {*NODE_WORDS, *CLIENT_WORDS, *NODE_KEYS}


def test_every_variable_that_is_read_has_a_row() -> None:
    read = set()
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        read |= set(re.findall(r"environ(?:ment)?(?:\.get\(|\[)\"([A-Z_]+)\"", text))
        read |= set(re.findall(r"\"((?:DARE_AGG|HF)_[A-Z_]+)\"", text))
    assert {"DARE_AGG_CACHE", "NO_COLOR", "HF_HUB_OFFLINE"} <= read
    assert not read - set(VARIABLES)


def test_every_key_has_meaning_heading_and_values() -> None:
    usual = app_defaults(find_app(ROOT))
    said = meanings(TaskConfig) | meanings(RunConfig)
    assert not set(usual) - set(said)
    assert [key for keys in key_groups(ROOT).values() for key in keys] == list(usual)
    assert all(values_of(key) for key in usual)
    assert all(f"| `{key}` |" in page() for key in (*usual, *NODE_WORDS, *VARIABLES))


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("num-rounds", "a whole number, ≥ 1, ≤ 100,000"),
        ("partition", "iid, dirichlet, column"),
        ("weighting", "examples, equal"),
        ("evaluate", "true, false"),
        ("dropout", "a number, ≥ 0, ≤ 0.9"),
        ("labels", "texts, by commas"),
    ],
)
def test_bounds_and_choices_are_those_of_the_field(key: str, values: str) -> None:
    assert values_of(key) == values


def test_a_stale_page_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stale = tmp_path / "CONFIG.md"
    stale.write_text("# Every word\n")
    monkeypatch.setattr("simulations.pages.config_words.PAGE", stale)
    monkeypatch.setattr("sys.argv", ["config_words", "--check"])
    with pytest.raises(SystemExit, match="another state of the code; run: python -m"):
        main()
    monkeypatch.setattr("sys.argv", ["config_words"])
    main()
    assert stale.read_text(encoding="utf-8") == page()


def test_documents_and_examples_quote_no_values() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    quoted = [
        f"{path.name}: {found}"
        for path in pages
        for found in re.findall(r"-c '[\w-]+=\"[^']*'", path.read_text(encoding="utf-8"))
    ]
    assert not quoted
    assert not [words for rows in EXAMPLES.values() for words, _ in rows if "-c '" in words]

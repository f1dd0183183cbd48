"""Every reason that the code gives is a row of one table, and every row is given somewhere."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from dare_agg import errors
from dare_agg.errors import REASONS, DareError

ROOT = Path(__file__).resolve().parent.parent
SLUG = re.compile(r"[a-z][a-z-]{0,31}")
# Where a reason is looked up: a mapping or list of such rows, named so.
TABLES = ("_HEADER_REASONS", "refusals")


def given(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and word of every reason written in a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            name = node.func.id if isinstance(node.func, ast.Name) else name
            if name == "Error":  # Flower's own, whose reason is free text
                continue
            words = [keyword.value for keyword in node.keywords if keyword.arg == "reason"]
            if name in ("Rejection", "reject", "Refusal"):
                words += node.args[1:2] if name != "Refusal" else node.args[:1]
            for word in words:
                yield from constants(word)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = {target.id for target in targets if isinstance(target, ast.Name)}
            if "reason" in names and node.value is not None:
                yield from constants(node.value)
            if names & set(TABLES):
                yield from table_rows(node.value)
        elif isinstance(node, ast.FunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args]
            defaults = node.args.defaults
            late = arguments[len(arguments) - len(defaults) :]
            pairs: list[tuple[ast.arg, ast.expr | None]] = [*zip(late, defaults, strict=True)]
            pairs += zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
            for argument, default in pairs:
                if argument.arg == "reason" and default is not None:
                    yield from constants(default)


def constants(node: ast.AST) -> Iterator[tuple[int, str]]:
    """The texts among the possible values of an expression."""
    if isinstance(node, ast.IfExp):
        yield from constants(node.body)
        yield from constants(node.orelse)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.lineno, node.value


def table_rows(node: ast.AST | None) -> Iterator[tuple[int, str]]:
    """The reasons of a mapping's values, or the second of three in each row of a sequence."""
    if isinstance(node, ast.Dict):
        for value in node.values:
            yield from constants(value)
    elif isinstance(node, ast.Tuple | ast.List):
        for row in node.elts:
            if isinstance(row, ast.Tuple) and len(row.elts) == 3:
                yield from constants(row.elts[1])


def all_given() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for room in ("dare_agg", "server", "client"):
        for path in sorted((ROOT / room).rglob("*.py")):
            for line, word in given(ast.parse(path.read_text(encoding="utf-8"))):
                found.setdefault(word, []).append(f"{path.relative_to(ROOT)}:{line}")
    return found


def test_every_reason_given_is_a_row() -> None:
    unknown = {word: places for word, places in all_given().items() if word not in REASONS}
    assert not unknown


def test_every_row_is_given_somewhere() -> None:
    assert not set(REASONS) - set(all_given())


def test_rows_are_slugs_with_a_text() -> None:
    assert all(SLUG.fullmatch(word) and text.strip() for word, text in REASONS.items())


def test_every_error_has_a_reason() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    raised = [kind("text") for kind in kinds if issubclass(kind, DareError)]
    assert len(raised) > 10 and {error.reason for error in raised} <= set(REASONS)


@pytest.mark.parametrize(
    "code",
    [
        'raise UpdateError("text", reason="no-such")',
        'raise UpdateError("text", reason="late" if late else "no-such")',
        'Rejection(3, "no-such", "text")',
        'log.reject(3, "no-such", "text")',
        'Refusal("no-such", "text")',
        'class OwnError(DareError):\n    reason = "no-such"',
        'def f(text, reason="no-such"): pass',
        'def f(text, *, reason="no-such"): pass',
        'refusals = ((True, "no-such", "text"),)',
        '_HEADER_REASONS = {"rank": "no-such"}',
    ],
)
def test_the_walk_sees_each_way_to_give_one(code: str) -> None:
    assert "no-such" in {word for _, word in given(ast.parse(code))}


@pytest.mark.parametrize("page", ["docs/FLOWER_APP.md", "SECURITY.md"])
def test_the_documents_name_rows_of_the_table(page: str) -> None:
    """The column of the reasons in a document's table holds nothing but rows."""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    named: set[str] = set()
    column = None
    for line in lines:
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if "reason" in cells:
            column = cells.index("reason")
        elif not line.startswith("|"):
            column = None
        elif column is not None:
            named |= set(re.findall(r"`([^`]+)`", cells[column]))
    assert len(named) > 10
    assert named <= set(REASONS)


def test_a_message_is_one_printable_line_whatever_it_names() -> None:
    error = DareError("name 'a\nb\x1b[2J\ud800' is unknown" + "x" * 5000)
    assert str(error).startswith("name 'a b [2J ' is unknownx")
    assert str(error).isprintable() and len(str(error)) == errors.MOST_CHARACTERS

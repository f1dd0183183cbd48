"""Docstrings: every public definition of the library has one, and what they show runs."""

from __future__ import annotations

import ast
import doctest
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dare_agg.merge.methods import METHODS
from simulations.pages import config_words

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "dare_agg").rglob("*.py"))
Function = ast.FunctionDef | ast.AsyncFunctionDef


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


TREES = {name_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
CLASSES = {
    node.name: node
    for tree in TREES.values()
    for node in ast.walk(tree)
    if isinstance(node, ast.ClassDef)
}


def methods(node: ast.ClassDef) -> dict[str, Function]:
    return {child.name: child for child in node.body if isinstance(child, Function)}


def lineage(node: ast.ClassDef) -> Iterator[ast.ClassDef]:
    """The class and those of the library it inherits from."""
    yield node
    for base in node.bases:
        if (parent := CLASSES.get(ast.unparse(base).partition("[")[0])) is not None:
            yield from lineage(parent)


def is_protocol(node: ast.ClassDef) -> bool:
    return any(ast.unparse(base).startswith("Protocol") for base in node.bases)


def said_elsewhere(node: ast.ClassDef) -> set[str]:
    """Members whose contract stands in a base class or a protocol that the class fulfils."""
    own = {name for part in lineage(node) for name in methods(part)}
    fields = {t.target.id for t in ast.walk(node) if isinstance(t, ast.AnnAssign)
              and isinstance(t.target, ast.Name)}  # fmt: skip
    contracts = list(lineage(node))[1:]
    for protocol in filter(is_protocol, CLASSES.values()):
        whole = {name for part in lineage(protocol) for name in methods(part)}
        if protocol is not node and whole <= own | fields:
            contracts += lineage(protocol)
    return {name for part in contracts for name, f in methods(part).items() if ast.get_docstring(f)}


def undocumented(name: str, node: ast.Module | ast.ClassDef) -> Iterator[str]:
    """Public definitions below a module or class that say nothing.

    Left out: what begins with ``_``, setters, what a base class or a fulfilled protocol of the
    library says already, and properties that the class's own docstring names in ``backticks``.
    """
    words = ast.get_docstring(node) or ""
    if not words:
        yield name
    said = said_elsewhere(node) if isinstance(node, ast.ClassDef) else set()
    for child in node.body:
        if not isinstance(child, Function | ast.ClassDef) or child.name.startswith("_"):
            continue
        if isinstance(child, ast.ClassDef):
            yield from undocumented(f"{name}.{child.name}", child)
            continue
        marks = {ast.unparse(mark).rpartition(".")[2] for mark in child.decorator_list}
        named = marks & {"property", "cached_property"} and f"``{child.name}``" in words
        if not (ast.get_docstring(child) or named or child.name in said or "setter" in marks):
            yield f"{name}.{child.name}"


@pytest.mark.parametrize("module", TREES)
def test_every_public_definition_says_what_it_is(module: str) -> None:
    assert not list(undocumented(module, TREES[module]))


@pytest.mark.parametrize(
    "module", [name_of(path) for path in FILES if ">>>" in path.read_text(encoding="utf-8")]
)
def test_every_example_runs(module: str) -> None:
    found = doctest.testmod(importlib.import_module(module))
    assert found.attempted and not found.failed


@pytest.mark.slow
def test_the_reference_is_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("pdoc")
    command = [sys.executable, str(ROOT / "scripts" / "docs.py"), str(tmp_path)]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert "merge_deltas" in (tmp_path / "dare_agg" / "merge" / "engine.html").read_text()
    assert (tmp_path / "dare_agg" / "flower" / "mod.html").is_file()


def test_the_walk_through_of_contributing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    shown: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", page, re.S):
        exec(code, shown)
    monkeypatch.setitem(METHODS, shown["ROW"].name, shown["ROW"])
    shown["test_an_outlier_does_not_move_the_median"]()


def test_the_page_of_all_words_is_of_this_code() -> None:
    """Mend it with: python -m simulations.pages.config_words."""
    assert config_words.PAGE.read_text(encoding="utf-8") == config_words.page()

"""The notebooks of docs/notebooks as pages: ``scripts/notebooks.py FOLDER`` runs them.

It writes one Markdown file each, with what their cells print.

Cells are plain Python and run one after another in one namespace, as in Jupyter; the value of a
cell's last line is shown.
"""

from __future__ import annotations

import ast
import contextlib
import io
import sys
from pathlib import Path
from typing import Any

from dare_agg.files.json_text import read_json

NOTEBOOKS = Path(__file__).parents[1] / "docs" / "notebooks"


def cells(path: Path) -> list[tuple[str, str]]:
    """Kind ("markdown" or "code") and text of each cell."""
    return [(cell["cell_type"], "".join(cell["source"])) for cell in read_json(path)["cells"]]


def run_cell(code: str, names: dict[str, Any]) -> str:
    """Run a cell; returns what it printed and the value of its last line, where it has one."""
    tree = ast.parse(code)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, "<cell>", "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), "<cell>", "eval"), names)
            if value is not None:
                print(repr(value))
    return printed.getvalue()


def page(path: Path) -> str:
    """A notebook, run, as Markdown."""
    names: dict[str, Any] = {"__name__": "__main__"}
    parts = []
    for kind, text in cells(path):
        if kind == "markdown":
            parts.append(text)
            continue
        parts.append(f"```python\n{text}\n```")
        if output := run_cell(text, names).rstrip():
            parts.append(f"```text\n{output}\n```")
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Entry point."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        (folder / f"{path.stem}.md").write_text(page(path), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Gathers the pages of the documentation for mkdocs: ``scripts/site.py FOLDER``.

Each page keeps its place in the repository, so that links between pages hold in both. What is no
page (code, tests, units) is named in `code` instead of linked; notebooks are run.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*.md",
         "dare_agg/codec/UPDATE_FORMAT.md")  # fmt: skip
PICTURES = ("docs/plots/*.svg",)
# The reference is made beside the site: no page of it.
API = """# Python modules

Every module, class and function, with equations, units and errors:
<a href="../reference/index.html">the API reference</a>.
"""
_LINK = re.compile(r"(?<!!)\[([^\]\n]*(?:\n[^\]\n]+)?)\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^(```.*?^```\s*?$)", re.M | re.S)


def gather(folder: Path) -> None:
    """Write all pages and pictures into a folder, which is emptied first."""
    shutil.rmtree(folder, ignore_errors=True)
    pages = [path for pattern in PAGES for path in sorted(ROOT.glob(pattern))]
    made = {Path("docs/notebooks") / f"{path.stem}.md" for path in _notebooks()}
    known = {path.relative_to(ROOT) for path in pages} | made
    for path in pages:
        place = path.relative_to(ROOT)
        _write(folder / place, relinked(path.read_text(encoding="utf-8"), place, known))
    for pattern in PICTURES:
        for path in sorted(ROOT.glob(pattern)):
            place = folder / path.relative_to(ROOT)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, place)
    notebooks = [sys.executable, str(ROOT / "scripts" / "notebooks.py")]
    subprocess.run([*notebooks, str(folder / "docs" / "notebooks")], check=True)
    _write(folder / "docs" / "API.md", API)


def relinked(text: str, place: Path, known: set[Path]) -> str:
    """The text of a page; links to what is no page become their words and the path."""

    def link(found: re.Match[str]) -> str:
        words, target = found[1], found[2]
        if re.match(r"[a-z]+:|#", target):
            return found[0]
        path = target.partition("#")[0]
        there = _within(place.parent / path.removesuffix(".ipynb"))
        if there.with_suffix(".md") in known and path.endswith(".ipynb"):
            return f"[{words}]({path.removesuffix('.ipynb')}.md)"
        if there in known:
            return found[0]
        bare = words.strip("`")
        return f"`{there}`" if bare in (path, str(there)) else f"{words} (`{there}`)"

    # Code is as it is.
    parts = _FENCE.split(text)
    return "".join(p if n % 2 else _LINK.sub(link, p) for n, p in enumerate(parts))


def _within(path: Path) -> Path:
    parts: list[str] = []
    for part in path.parts:
        if part == "..":
            parts.pop()
        elif part != ".":
            parts.append(part)
    return Path(*parts)


def _notebooks() -> Iterator[Path]:
    return (ROOT / "docs" / "notebooks").glob("*.ipynb")


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def outside(folder: Path) -> list[str]:
    """What pages of a site load from elsewhere; links that a reader may follow are none."""
    loads = re.compile(
        r"<(?:script|img|iframe|source)[^>]+src=\"?(https?:[^\s\">]+)"
        r"|<link[^>]+rel=\"?(?:stylesheet|preload|preconnect|icon)[^>]+href=\"?(https?:[^\s\">]+)"
    )
    found = set()
    for page in folder.rglob("*.html"):
        for match in loads.finditer(page.read_text(encoding="utf-8", errors="replace")):
            found.add(f"{page.relative_to(folder)}: {match[1] or match[2]}")
    return sorted(found)


def main() -> None:
    """Gather into a folder, or with ``--check SITE`` fail where a page loads from elsewhere."""
    if sys.argv[1] == "--check":
        if found := outside(Path(sys.argv[2])):
            sys.exit("error: pages load from elsewhere:\n" + "\n".join(found))
        return
    gather(Path(sys.argv[1]))


if __name__ == "__main__":
    main()

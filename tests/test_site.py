"""The documentation as a site: each page has its place, links hold, nothing is from elsewhere."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "site.py"


def script():
    spec = importlib.util.spec_from_file_location("gather_site", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Plain(yaml.SafeLoader):
    """Reads mkdocs.yml without making what its tags name."""


Plain.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: None)


def places(nav: object) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    return [place for part in parts for place in places(part)]


@pytest.fixture(scope="module")
def gathered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site") / "docs"
    subprocess.run([sys.executable, str(SCRIPT), str(folder)], check=True, cwd=ROOT)
    return folder


def test_every_page_has_its_place(gathered: Path) -> None:
    nav = yaml.load((ROOT / "mkdocs.yml").read_text(), Plain)["nav"]
    pages = {str(path.relative_to(gathered)) for path in gathered.rglob("*.md")}
    assert sorted(places(nav)) == sorted(pages)
    assert [next(iter(part)) for part in nav[1:]] == [
        "Tutorial", "How to", "Reference", "Explanation",
    ]  # fmt: skip


def test_links_between_pages_hold_in_the_repository_too() -> None:
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")):
        text = script()._FENCE.sub("", path.read_text(encoding="utf-8"))
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            place, _, anchor = target.partition("#")
            if re.match(r"[a-z]+:", target) or not (place or anchor):
                continue
            there = path.parent / place if place else path
            assert there.exists(), f"{path.name}: {target}"


def test_what_is_no_page_is_named_instead_of_linked() -> None:
    relinked, known = script().relinked, {Path("docs/B.md"), Path("docs/notebooks/n.md")}

    def of(text: str) -> str:
        return relinked(text, Path("docs/A.md"), known)

    assert of("[b](B.md#part)") == "[b](B.md#part)"
    assert of("[x](https://arxiv.org)") == "[x](https://arxiv.org)"
    assert of("[n](notebooks/n.ipynb)") == "[n](notebooks/n.md)"
    assert of("[`unit`](deploy/u.service)") == "`unit` (`docs/deploy/u.service`)"
    assert of("[../client/app.py](../client/app.py)") == "`client/app.py`"
    assert of("```\n[c](x.py)\n```\n") == "```\n[c](x.py)\n```\n"
    assert of("![p](plots/p.svg)") == "![p](plots/p.svg)"


def test_a_page_that_loads_from_elsewhere_is_found(tmp_path: Path) -> None:
    outside = script().outside
    (tmp_path / "good.html").write_text('<a href="https://x.org">x</a><img src="a.svg">')
    assert outside(tmp_path) == []
    (tmp_path / "font.html").write_text('<link rel="stylesheet" href="https://fonts.org/a.css">')
    (tmp_path / "script.html").write_text("<script src=https://cdn.org/a.js></script>")
    found = ["font.html: https://fonts.org/a.css", "script.html: https://cdn.org/a.js"]
    assert outside(tmp_path) == found


def test_the_site_is_built_strictly(gathered: Path, tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the extra docs is not installed")
    config = (ROOT / "mkdocs.yml").read_text()
    config = config.replace("docs_dir: build/docs", f"docs_dir: {gathered}")
    config = config.replace("site_dir: site", f"site_dir: {tmp_path / 'out'}")
    (tmp_path / "mkdocs.yml").write_text(config)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    subprocess.run([*command, "-f", str(tmp_path / "mkdocs.yml")], check=True, timeout=300)
    assert script().outside(tmp_path / "out") == []
    assert "Masks and ranks" in (tmp_path / "out" / "docs" / "IDEAS.html").read_text()

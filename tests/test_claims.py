"""Differences that the pages tell in words: what their intervals do not carry is no claim.

A figure "x ± y" in points whose interval covers zero and reaches beyond two points, or is wider
than that, stands in a sentence that says so ("no difference is shown", "at least", …). One that
lies within two points of zero tells that two things are level. Tables judge by themselves
(`simulations.pages.tables.verdict`).
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
WIDEST = 2.0
FIGURE = re.compile(r"([+−-]?\d*\.?\d+) ± (\d*\.?\d+)")
HEDGED = re.compile(
    r"no difference|not shown|shows? (nothing|little)|is shown|no finding|not known|level|within|"
    r"at least|not told apart|not rank|with an interval of|in the mean alone"
)


def unbacked(text: str) -> list[str]:
    """Sentences that claim a difference in points which its interval does not carry."""
    prose = re.sub(r"```.*?```|^\s*[|!].*?$|<!--.*?-->", "", text, flags=re.S | re.M)
    found = []
    for paragraph in re.split(r"\n\s*\n|\n\s*[-*] ", prose):
        for sentence in re.split(r"(?<=[.:])\s+", " ".join(paragraph.split())):
            if "point" not in sentence or HEDGED.search(sentence):
                continue
            for mean, half in FIGURE.findall(sentence):
                least, wide = abs(float(mean.replace("−", "-"))), float(half)
                if wide > WIDEST or (least <= wide and least + wide > WIDEST):
                    found.append(sentence)
                    break
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_claim_what_their_intervals_carry(page: Path) -> None:
    assert unbacked(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("sentence", "fine"),
    [
        ("It is 2.0 ± .4 points above TIES.", True),
        ("It is 10.7 ± 6.2 points above the average.", False),
        ("It gains +.5 ± 1.9 points.", False),
        ("It is −.3 ± .9 points from it.", True),
        ("No difference is shown (+.5 ± 1.9 points).", True),
        ("It is at least 4 points above (11.1 ± 7.0).", True),
        ("| a | +0.3 ± 2.4 points |", True),
    ],
)
def test_the_rule_itself(sentence: str, fine: bool) -> None:
    assert (unbacked(sentence) == []) == fine

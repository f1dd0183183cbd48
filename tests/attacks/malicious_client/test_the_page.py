"""A client's name, reason and answers are HTML, scripts and control characters: a page shows them.

In a real Chromium, live on loopback and in a report's file.
"""

from __future__ import annotations

import json

import pytest

from dare_agg.runs.answers import Answers
from dare_agg.runs.report import read_run, write_report
from dare_agg.runs.watch import serve
from tests.chromium import Chromium, chromium
from tests.runs.made_run import EVIL, TOKEN, a_row, made_run

__all__ = ["chromium"]


@pytest.mark.parametrize("live", [True, False])
def test_words_of_a_malicious_client_are_text(chromium: Chromium, tmp_path, live):
    """Names, reasons, refusals and answers: shown as they are, and nothing of them happens."""
    said = [{"client": 1, "name": evil, "reason": evil, "detail": evil} for evil in EVIL]
    told = [{"client": e, "bytes": 1, "examples": 2.0, "p": 0.9, "values": e} for e in EVIL]
    row = a_row(
        EVIL[0], 1, 0.5, rejected=said, refused=said, evaluate_failed=said, away=list(EVIL),
        weights_cut=list(EVIL), by_client=told, noise_warning=EVIL[1], value_format=EVIL[2],
        robust={"unheard": list(EVIL)},
        by_task=[{"client": e, "task": e, "rows": 3, "loss": 1.0} for e in EVIL],
    )  # fmt: skip
    now = {"method": EVIL[0], "phase": "train", "round": 1, "rounds": 2, "asked": 4,
           "waiting": list(EVIL)}  # fmt: skip
    folder = made_run(
        tmp_path / "run", [row], now=now, log="\n".join(EVIL), model=EVIL[1], methods=list(EVIL)
    )
    state = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**state, "error": EVIL[0]}))
    answers = Answers(EVIL[1], ((EVIL[0], 9.0, 0.1),), ((EVIL[1], EVIL[2], EVIL[0]),), ((True,),))
    path = write_report(
        tmp_path / "page.html", read_run(folder), title=EVIL[1], lead=EVIL[0], answers=[answers],
        settings=([EVIL[0], EVIL[1]], [(EVIL[2], (EVIL[0], EVIL[1]))]), command=EVIL[1],
    )  # fmt: skip
    with serve(folder, 0) as page:
        chromium.open(page.address if live else path.as_uri(), width=390)
        chromium.eval("new Promise((done) => setTimeout(done, 300))")
        assert chromium.eval("typeof window.hacked") == "undefined"
        assert (
            chromium.eval("document.querySelectorAll('img, iframe, [onerror], [onload]').length")
            == 0
        )
        assert chromium.eval("document.querySelectorAll('script').length") == (1 if live else 2)
        assert chromium.eval("document.scrollingElement.scrollWidth") == 390
        text = chromium.eval("document.body.textContent")
        assert EVIL[0] in text and EVIL[2] in text and "\u202e" not in text and "\x1b" not in text
        assert not chromium.complaints()
    assert TOKEN not in path.read_text("utf-8")

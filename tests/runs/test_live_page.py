"""The page that follows a run, in a real Chromium."""

from __future__ import annotations

import pytest

from dare_agg.runs.watch import serve
from tests.chromium import CONTRAST, SIZES, Chromium, chromium
from tests.runs.made_run import a_row, made_run, two_methods

__all__ = ["chromium"]


def test_a_page_that_follows_a_run_shows_what_comes_and_keeps_the_readers_place(
    chromium: Chromium, tmp_path
):
    now = {"method": "fedavg", "phase": "train", "round": 2, "rounds": 5, "asked": 3, "answered": 2,
           "waiting": ["west"]}  # fmt: skip
    folder = made_run(tmp_path / "run", [a_row("fedavg", 1, 0.5)], now=now, log="INFO :  one\n")
    with serve(folder, 0) as page:
        chromium.open(page.address)
        text = "document.body.innerText"
        assert "2 of 3 answered, waiting for west" in chromium.eval(text)
        assert chromium.eval("document.querySelector('progress').value") == 1
        chromium.eval("document.getElementById('target').focus()")
        rows = [a_row("fedavg", n, 0.5 + n / 100) for n in (1, 2)]
        made_run(folder, rows, now={**now, "phase": "evaluate", "answered": 3}, log="INFO :  two\n")
        chromium.wait(f"{text}.includes('evaluation, 3 of 3 answered')")
        assert chromium.eval("document.activeElement.id") == "target"
        assert "two" in chromium.eval("document.querySelector('#log pre').textContent")
        assert chromium.eval("document.querySelectorAll('#by-round-plot .mark').length") == 2
        made_run(folder, rows, status="completed")
        chromium.wait("document.title.startsWith('completed')")
        assert not chromium.complaints()
        assert {one.rsplit("/", 2)[0] for one in chromium.fetched()} == {
            page.address.rstrip("/").rsplit("/", 1)[0]
        }
    chromium.wait("document.body.innerText.includes('has ended, or cannot be reached')")
    assert "3.0 kB" in chromium.eval(text)


@pytest.mark.parametrize(("width", "dark"), SIZES)
def test_the_page_of_a_run_fits_and_is_read(chromium: Chromium, tmp_path, width, dark):
    folder = two_methods(tmp_path / "run", log="INFO :  " + "x" * 390 + "\n")
    with serve(folder, 0) as page:
        chromium.open(page.address, width=width, dark=dark)
        assert chromium.eval("document.scrollingElement.scrollWidth") == width
        assert not [one for one in chromium.eval(CONTRAST) if one[1] < 4.5]

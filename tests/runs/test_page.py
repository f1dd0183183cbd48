"""The page of runs in a real Chromium: on a phone and a desk, light and dark, by keys alone."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest

from dare_agg.runs.answers import Answers
from dare_agg.runs.report import read_run, write_report
from dare_agg.runs.report.parts import STYLE, part, script
from tests.chromium import CONTRAST, SIZES, Chromium, chromium
from tests.runs.made_run import a_row, made_run, two_methods

__all__ = ["chromium"]


@pytest.fixture
def report(tmp_path: Path) -> str:
    """The report of two methods whose curves lie on each other, with answers and rejections."""
    late = {"client": 1, "name": "south", "reason": "late", "detail": "no answer in 20 s"}
    folder = two_methods(tmp_path / "run", rounds=12, apart=0.0005, status="completed")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows[-1]["rejected"] = [late]
    rows[-1]["by_client"] = rows[-1]["by_client"][::2]
    made_run(folder, rows, status="completed")
    answers = Answers(
        "talks", (("before", 9.0, 0.1), ("after", 3.0, 0.9)), (("2+2?", "4", "5", "4"),),
        ((False, True),), 20, 10,
    )  # fmt: skip
    path = write_report(
        tmp_path / "report.html", read_run(folder), title="A run", lead="lead", answers=[answers]
    )
    return path.as_uri()


@pytest.mark.parametrize(("width", "dark"), SIZES)
def test_it_fits_is_read_and_fetches_nothing(chromium: Chromium, report, width, dark):
    chromium.open(report, width=width, dark=dark)
    assert chromium.eval("document.scrollingElement.scrollWidth") == width
    assert not chromium.complaints() and chromium.fetched() == [report]
    found = chromium.eval(CONTRAST)
    # WCAG 2.1 AA: 4.5 for text, 3 for what is drawn and for the edges of controls.
    assert len(found) > 100 and {"CURVE", "EDGE", "text", "BDI"} <= {name for name, _ in found}
    assert not [one for one in found if one[1] < 4.5]
    ground = chromium.eval("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground))) < 200) == dark


@pytest.mark.parametrize("width", [390, 1200])
def test_no_mark_is_cut_and_no_label_lies_on_another(chromium: Chromium, report, width):
    chromium.open(report, width=width)
    assert chromium.eval("document.querySelectorAll('.plot').length") == 2
    cut = chromium.eval("""[...document.querySelectorAll('.plot')].flatMap((plot) => {
      const axis = plot.querySelector('path.axis').getBoundingClientRect();
      const whole = plot.getBoundingClientRect();
      const marks = [...plot.querySelectorAll('.mark')].map((one) => one.getBoundingClientRect());
      const texts = [...plot.querySelectorAll('text')].map((one) => one.getBoundingClientRect());
      const bad = marks.filter((m) => m.left < axis.left - .5 || m.right > axis.right + .5
        || m.top < axis.top - .5 || m.bottom > axis.bottom + .5);
      const out = texts.filter((t) => t.left < whole.left - 1 || t.right > whole.right + 1);
      const over = texts.filter((a, i) => texts.some((b, j) => i < j
        && a.left < b.right && b.left < a.right && a.top < b.bottom - 2 && b.top < a.bottom - 2));
      return [bad.map(() => 'mark'), out.map(() => 'text out'), over.map(() => 'over')].flat();
    })""")
    assert cut == []
    assert chromium.eval("document.querySelectorAll('.plot .mark').length") > 8


def test_curves_on_each_other_are_said_and_drawn_apart(chromium: Chromium, report):
    chromium.open(report)
    said = chromium.eval("document.querySelector('.same').textContent")
    assert said == (
        "FedAvg and DARE TIES lie on each other: in all 12 rounds they differ by 0.05 points at "
        "most."
    )
    drawn = chromium.eval("""[...document.querySelector('.plot').querySelectorAll('.curve')].map(
      (one) => [one.getAttribute('stroke-dasharray'), Number(one.getAttribute('stroke-width'))])""")
    assert drawn[0][0] != drawn[1][0] and drawn[0][1] > drawn[1][1] + 1
    kinds = "[...document.querySelectorAll('#by-round-plot .mark')].map((m) => m.tagName)"
    assert len(set(chromium.eval(kinds))) == 2


def test_keys_alone_read_values_choose_and_hide(chromium: Chromium, report):
    chromium.open(report)
    seen = []
    for _ in range(12):
        chromium.press("Tab")
        seen.append(chromium.eval("document.activeElement.id || document.activeElement.className"))
        outline = chromium.eval("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none", seen
        if seen[-1] == "by-round-plot":
            break
    assert seen[0] == "skip" and {"by-round-measure", "by-round-axis"} <= set(seen)
    said = "document.getElementById('by-round-plot-said').textContent"
    chromium.press("ArrowRight")
    chromium.press("ArrowRight")
    assert chromium.eval(said) == "Round 2: FedAvg 60.0 %; DARE TIES 60.1 %"
    chromium.press("End")
    assert chromium.eval(said).startswith("Round 12: FedAvg 160.0 %")
    chromium.press("Escape")
    assert "arrow keys" in chromium.eval(said)
    chromium.press("Tab")
    chromium.press("Enter", "\r")
    assert chromium.eval("document.activeElement.getAttribute('aria-pressed')") == "false"
    assert chromium.eval("document.querySelectorAll('#by-round-plot .curve').length") == 1
    chromium.eval("document.getElementById('by-round-measure').focus()")
    chromium.press("ArrowDown")
    assert chromium.eval("document.querySelector('#curves h2').textContent") != "Accuracy by rounds"


def test_what_a_target_costs_follows_the_readers_number(chromium: Chromium, report):
    chromium.open(report)
    cells = """[...document.querySelectorAll('#target-cost tbody tr')].map(
      (row) => [...row.children].map((cell) => cell.textContent))"""
    chromium.eval("""(() => { const input = document.getElementById('target'); input.value = '70';
      input.dispatchEvent(new Event('input')); })()""")
    first, second = chromium.eval(cells)
    assert first == ["FedAvg", "3", "4.5 kB", "36.0 kB", "40.5 kB", "30 s"] and second[1] == "3"
    chromium.eval("""(() => { const input = document.getElementById('target'); input.value = '999';
      input.dispatchEvent(new Event('input')); })()""")
    assert [row[1] for row in chromium.eval(cells)] == ["not reached"] * 2


def test_totals_clients_answers_and_who_was_left_out_stand_there(chromium: Chromium, report):
    chromium.open(report, width=390)
    text = chromium.eval("document.body.innerText")
    for words in ("Up in all", "18.0 kB", "Down in all", "144.0 kB", "Both ways", "162.0 kB",
                  "rejected: late: no answer in 20 s", "Clients of round 12: DARE TIES",
                  "perplexity 3.00", "exact match 90.0 %", "1 of 24"):  # fmt: skip
        assert words in text, words
    # A cell of a narrow page says which column it is.
    second = "document.querySelector('#result td:nth-child(2)')"
    assert chromium.eval(f"getComputedStyle({second}, '::before').content") == '"Accuracy"'
    assert chromium.eval("document.querySelectorAll('#clients .bar').length") == 5
    heights = "[...document.querySelectorAll('#clients .amount > bdi')].map((n) => n.offsetHeight)"
    assert max(chromium.eval(heights)) < 30  # no number is broken


def test_numbers_beyond_all_measure_neither_hang_nor_empty_the_page(chromium: Chromium, tmp_path):
    odd = (1e17, 1e17 + 16, 1e299, -1e299, 1e-320, 0.0)
    rows = [
        a_row("fedavg", n, value, perplexity=abs(value), **{"train-loss": value, "noise": value})
        for n, value in enumerate(odd, 1)
    ]
    folder = made_run(tmp_path / "run", rows, status="completed")
    path = write_report(tmp_path / "page.html", read_run(folder), title="t", lead="l")
    chromium.open(path.as_uri())
    assert not chromium.complaints()
    for number in range(chromium.eval("document.getElementById('by-round-measure').length")):
        chromium.eval(f"""(() => {{ const one = document.getElementById('by-round-measure');
          one.selectedIndex = {number}; one.dispatchEvent(new Event('change')); }})()""")
    assert not chromium.complaints()


def test_without_scripts_the_table_is_there(report):
    text = Path(report.removeprefix("file://")).read_text("utf-8")
    still = text[text.index("<noscript>") : text.index("</noscript>")]
    assert "<td>FedAvg</td>" in still and "<td>162.0 kB</td>" in still


def test_scripts_make_no_html_of_words_and_name_no_address():
    for code in (script("still.js"), script("live.js")):
        for way in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(",
                    "Function(", "DOMParser", "srcdoc", "setHTML", "createContextual"):  # fmt: skip
            assert way not in code, way
        assert set(re.findall(r"https?://[\w./]+", code)) == {"http://www.w3.org/2000/svg"}
    assert "url(" not in part(STYLE) and "@import" not in part(STYLE)


@pytest.mark.parametrize("measured", [(1.0, 1.0), (0.9991, 0.9999), (0.0, 0.0)])
def test_ticks_differ_and_a_flat_curve_has_none_above_everything(chromium, tmp_path, measured):
    folder = made_run(tmp_path / "run", [a_row("fedavg", 1 + n, v) for n, v in enumerate(measured)])
    path = write_report(tmp_path / "r.html", read_run(folder), title="A run", lead="lead")
    chromium.open(path.as_uri())
    ticks = chromium.eval("""[...document.querySelectorAll(
      '#by-round-plot text[text-anchor=end]')].map((one) => Number(one.textContent))""")
    assert len(ticks) > 2 and len(set(ticks)) == len(ticks) and max(ticks) <= 100
    steps = [after - before for before, after in itertools.pairwise(ticks)]
    assert max(steps) == pytest.approx(min(steps), rel=1e-6)

import json
from pathlib import Path

import pytest

from dare_agg.cli.demo import answer_tables
from dare_agg.errors import StateError
from dare_agg.runs.answers import ANSWERS_FILE, read_answers
from dare_agg.runs.report import RoundRecord, RunRecord, table_columns, table_row, write_report
from dare_agg.runs.rows import RunRow
from tests.runs.made_run import facts_in

SECTION = {
    "data": "sums",
    "questions": ["2 + 2?", "<i>3</i> + 3?"],
    "wanted": ["4", "6"],
    "models": [
        {
            "name": "before",
            "loss": 2.0,
            "exact-match": 0.0,
            "answers": ["To add, we", "x" * 700],
            "right": [False, False],
        },
        {
            "name": "FedAvg",
            "loss": 1.0,
            "exact-match": 0.5,
            "answers": ["so 4", "7"],
            "right": [True, False],
        },
    ],
    "rows": 48,
    "answered": 8,
}


def write(folder: Path, value: object) -> Path:
    (folder / ANSWERS_FILE).write_text(json.dumps(value))
    return folder


def language_run(name: str, upload: float, *perplexities: float) -> RunRecord:
    rounds = tuple(
        RoundRecord(
            number, 0.1, 1.0, upload, 0.0, 5000.0, 4, 2.0, perplexity=p, exact_match=number / 10
        )
        for number, p in enumerate(perplexities, 1)
    )
    told = [{"client": "0", "task": "sums", "rows": 8, "loss": 1.0, "exact-match": 0.25}]
    return RunRecord(
        name, rounds, 1000, 9.0, {}, None, "ab" * 32, (RunRow.of(name, 1, {}, by_task=told),)
    )


def test_answers_are_read_with_their_perplexity(tmp_path: Path) -> None:
    assert read_answers(tmp_path) == []
    (one,) = read_answers(write(tmp_path, {"sections": [SECTION]}))
    assert one.models[0][0] == "before" and one.models[0][1] == pytest.approx(7.389, abs=1e-3)
    assert one.models[1][2] == 0.5
    assert one.lines[0] == ("2 + 2?", "4", "To add, we", "so 4")
    assert len(one.lines[1][2]) == 601 and one.lines[1][2].endswith("…")
    assert one.right == ((False, True), (False, False))
    assert answer_tables([one])[0].row_count == 2


@pytest.mark.parametrize(
    "value",
    [[], {"sections": [{}]}, {"sections": [{**SECTION, "wanted": ["4"]}]},
     {"sections": [{**SECTION, "questions": "ab"}]}],
)  # fmt: skip
def test_a_file_that_holds_none_is_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(StateError, match="holds no answers of models"):
        read_answers(write(tmp_path, value))


def test_the_page_of_language_models_shows_answers_side_by_side(tmp_path: Path) -> None:
    answers = read_answers(write(tmp_path, {"sections": [SECTION]}))
    runs = [language_run("fedavg", 4000.0, 5.0, 3.0), language_run("dare-ties", 40.0, 5.5, 3.3)]
    assert table_columns(runs)[:3] == ("Method", "Perplexity", "Exact match")
    assert table_row(runs[1], runs) == ["3.30", "20.0 %", "40 B", "100×", "5.0 kB", "9"]
    path = write_report(tmp_path / "a.html", runs, title="t", lead="l", answers=answers)
    text = path.read_text(encoding="utf-8")
    facts = facts_in(text)
    (shown,) = facts["answers"]
    assert facts["main"] == "perplexity" and facts["before"] == pytest.approx(7.389, abs=1e-3)
    assert shown["title"] == "Answers side by side: sums" and "exact match 50.0 %" in text
    assert "perplexity 7.39" in shown["columns"][2] and "<i>" not in text
    assert any("<i>3</i> + 3?" in row for row in shown["rows"])
    # Right answers are marked, wrong ones are not.
    marked = {
        text: good
        for row, right in zip(shown["rows"], shown["right"], strict=True)
        for text, good in zip(row[2:], right, strict=True)
    }
    assert marked["so 4"] is True and marked["7"] is False
    assert "+10.0 %" in text and "against dense FedAvg" in text
    assert "FedAvg: by client and task" in text and "all clients" in text
    again = write_report(tmp_path / "b.html", runs, title="t", lead="l", answers=answers)
    assert path.read_bytes() == again.read_bytes()

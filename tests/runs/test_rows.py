import json
from pathlib import Path

import pytest

from dare_agg.errors import StateError
from dare_agg.runs.report import read_run
from dare_agg.runs.rows import RunRow, parse_row, read_rows


def test_a_row_is_read_as_it_was_made():
    row = RunRow.of("dare-ties", 3, {"accuracy": 0.5, "f1": 0.4}, train_loss=None, clients=2)
    assert list(row.values) == ["method", "round", "accuracy", "f1", "train-loss", "clients"]
    assert (row.method, row.round, row.accuracy, row.clients) == ("dare-ties", 3, 0.5, 2)
    assert row.train_loss is None and row.secure_results is None
    with pytest.raises(KeyError, match="client_count"):
        RunRow.of("x", 1, {}, client_count=2)


def test_a_clients_metric_is_no_key_of_ours():
    row = RunRow.of("fedavg", 1, {"round": 9.0, "clients": 5.0, "method": 1.0}, clients=2)
    assert (row.method, row.round, row.clients) == ("fedavg", 1, 2)


@pytest.mark.parametrize("values", [{}, {"round": None, "rejected": "x", "loss": True, "new": 1}])
def test_rows_of_other_versions_are_read(values):
    row = RunRow(values)
    assert (row.method, row.round, row.loss, row.rejected) == ("run", 0, None, ())
    assert row.parameters is None and row.round_seconds == 0.0
    assert row.values == values


@pytest.mark.parametrize("line", [b"[1]", b"7", b'"x"', b"\xff", b"null"])
def test_a_line_that_is_no_row_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line + b'\n{"round": 2}\n')
    with pytest.raises(StateError, match="line 1"):
        read_rows(path)
    assert [row.round for row in read_rows(path, strict=False)] == [2]


def test_values_that_are_no_numbers_read_as_absent() -> None:
    row = parse_row('{"round": NaN, "seconds": 1e999, "clients": 1' + "0" * 400 + ', "loss": true}')
    assert (row.round, row.seconds, row.clients, row.loss) == (0, 0.0, 0, None)
    row = parse_row('{"rejected": [1], "weights_cut": [null], "method": 5}')
    assert (row.rejected, row.weights_cut, row.method) == ((), (), "run")


@pytest.mark.parametrize("word", ["x" * 5000, "a\0b", "\U0001f600" * 300])
def test_a_name_that_no_file_can_have_is_no_file(tmp_path: Path, word: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"round": 1, "method": word}) + "\n")
    (tmp_path / "run.json").write_text(json.dumps({"config": {"model": word}}))
    (run,) = read_run(tmp_path, histograms=True)
    assert (run.histogram, run.parameters) == (None, 0)

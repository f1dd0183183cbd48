import pytest

from dare_agg.runs.rows import RunRow


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

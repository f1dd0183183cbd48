"""Several drop rates and formats in one run: its rows, and what cannot have several."""

import pytest

from dare_agg.codec.payload import payload_bytes
from dare_agg.codec.update import HEADER_BYTES
from dare_agg.errors import ConfigError
from dare_agg.runs.log import planned_methods, seconds_left
from dare_agg.runs.report.records import title_of
from dare_agg.runs.rows import RunRow
from dare_agg.runs.variants import WHOLE, parts_of, variants
from server.compared import METHODS
from server.config import DEFAULTS
from server.outlook import outlook
from server.reading import read_config, settled
from server.several import rows_of


def config(**words):
    return read_config({key.replace("_", "-"): value for key, value in words.items()})


def test_each_rate_and_format_of_each_method_that_drops_is_a_row_with_its_own_config():
    found = config(methods="fedavg,dare-ties", drop_rate="0.9, 0.99", values="b1,i8")
    rows = [(one.name, own.drop_rate, own.values) for one, own in rows_of(found, settled)]
    assert rows == [
        ("fedavg", "0.9", "b1"),
        ("dare-ties_p0.9_b1", "0.9", "b1"),
        ("dare-ties_p0.9_i8", "0.9", "i8"),
        ("dare-ties_p0.99_b1", "0.99", "b1"),
        ("dare-ties_p0.99_i8", "0.99", "i8"),
    ]
    said = found.model_dump(mode="json", by_alias=True)
    assert planned_methods(said) == [name for name, *_ in rows]
    assert title_of("dare-ties_p0.99_b1") == "DARE TIES, p = 0.99, b1"
    assert title_of("secure-ties") == "secure-ties" and title_of("dare-ties") == "DARE TIES"


def test_one_rate_is_a_run_as_before_and_auto_may_stand_in_a_list():
    (row,) = variants(config(drop_rate="0.9").model_dump(by_alias=True))
    assert (row.name, row.values) == ("dare-task-arithmetic", "b1")
    listed = config(drop_rate="auto,0.9,1/3")
    rows = {one.name: own for one, own in rows_of(listed, settled)}
    # Beside a number the format is one, with "auto" each round's choice.
    assert [(own.drop_rate, own.values) for own in rows.values()] == [
        ("auto", "auto"), ("0.9", "b1"), ("1/3", "b1"),
    ]  # fmt: skip
    assert list(rows)[2] == "dare-task-arithmetic_p1-of-3"
    assert parts_of(list(rows)[2]) == ("dare-task-arithmetic", "p = 1/3")


def test_what_sends_every_value_is_what_the_table_of_methods_says():
    assert {name for name, row in METHODS.items() if "drop_rate" in row.words} == set(WHOLE)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ({"drop_rate": "0.9,1.5"}, "drop rate 1.5 is outside"),
        ({"drop_rate": "0.9,x"}, "drop rate 'x' is not a number"),
        ({"values": "b1,b3"}, "value format 'b3'"),
        ({"drop_rate": "0.9,0.9"}, "names one twice"),
        ({"drop_rate": "0.9,0.99", "upload_budget": "300kB"}, "upload budget"),
        ({"drop_rate": "0.9,0.99", "methods": "fedavg"}, "send every value"),
        ({"drop_rate": "0.9,0.99", "secure": "ties"}, "one mask"),
        ({"values": "b1,b4", "drop_rate": "0.5", "dp": "clients"}, "of one model"),
        ({"drop_rate": ",".join(f"0.{n}" for n in range(10, 50))}, "at most 32"),
        ({"drop_rate": "0.9,0.99", "directions": 4}, "directions"),
    ],
)
def test_what_cannot_have_several_rows_is_refused_before_the_run(words, why):
    with pytest.raises(ConfigError, match=why):
        config(**words)


def test_a_dry_run_tells_of_each_row_and_time_left_counts_them():
    words = {"drop-rate": "0.9,0.99", "num-rounds": 2}
    states = {"full": {"w": (10000, 100)}}
    told = outlook({**DEFAULTS, **words}, {"states": states})["methods"]
    assert [one["name"] for one in told] == [
        "dare-task-arithmetic_p0.9", "dare-task-arithmetic_p0.99",
    ]  # fmt: skip
    # A tenth and a hundredth of a million values in a bit each, and the header.
    sizes = [HEADER_BYTES + payload_bytes("b1", kept) for kept in (100_000, 10_000)]
    assert [one["up"] for one in told] == sizes
    done = RunRow({"method": "dare-task-arithmetic_p0.9", "round": 1, "seconds": 10.0,
                   "round_seconds": 10.0})  # fmt: skip
    run = {**words, "methods": ["dare-task-arithmetic"], "values": "b1"}
    assert seconds_left([done], run) == 30

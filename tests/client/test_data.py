import re

import numpy as np
import pytest

from client.config import configure
from client.data import BUILT_IN, load_text
from client.partition import by_column, dirichlet, hold_out, iid, partition
from dare_agg.errors import ConfigError

COLUMNS = {"text_column": "review", "label_column": "tone", "partition_by": "author"}


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "dataset"])
def test_every_file_kind_gives_the_same_rows(review_files, kind):
    data = load_text(str(review_files[kind]), **COLUMNS)
    reference = load_text(str(review_files["csv"]), **COLUMNS)
    assert data.label_names == ("negative", "positive")
    assert len(data.train) == 192 and len(data.test) == 48
    assert data.train.inputs == reference.train.inputs
    assert np.array_equal(data.test.labels, reference.test.labels)
    assert set(data.train.groups) == {f"author {i}" for i in range(6)}


@pytest.mark.parametrize(
    ("name", "classes", "rows"),
    [
        ("reuters-r8", 8, 5485),
        ("election", 2, 5155),
        ("rotten-tomatoes", 2, 6824),
        ("sms", 2, 3890),
    ],
)
def test_built_in_sets(name, classes, rows):
    data = load_text(name)
    assert (len(data.label_names), len(data.train)) == (classes, rows)
    assert len(data.test) > 0


def test_unknown_column_and_label_are_named(review_files):
    with pytest.raises(ConfigError, match="no column 'text'"):
        load_text(str(review_files["csv"]))
    with pytest.raises(ConfigError, match=r"has label .(positive|negative)"):
        load_text(str(review_files["csv"]), **COLUMNS, label_names=("positiv", "neg"))


def test_unknown_data_says_what_was_tried(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match="did you mean 'reuters-r8'"):
        load_text("reuters-r9")
    with pytest.raises(ConfigError, match="does not exist"):
        load_text("nowhere.csv")


def test_same_seed_same_rows_other_seed_other_rows(review_files):
    first, again, other = (
        load_text(str(review_files["csv"]), **COLUMNS, seed=seed).train.inputs for seed in (1, 1, 2)
    )
    assert first == again != other


@pytest.mark.parametrize("rule", ["iid", "dirichlet", "column"])
def test_partitions_are_disjoint_and_complete(rule):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 1000)
    groups = [f"g{i}" for i in rng.integers(0, 30, 1000)]
    parts = partition(rule, labels, groups, 10, alpha=0.5, seed=3)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(1000))
    again = partition(rule, labels, groups, 10, alpha=0.5, seed=3)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))


def test_dirichlet_is_skewed_and_iid_is_not():
    labels = np.repeat(np.arange(4), 500)

    def spread(parts):
        shares = [np.bincount(labels[p], minlength=4) / len(p) for p in parts]
        return np.std(shares)

    assert spread(dirichlet(labels, 10, 0.1, 0)) > 4 * spread(iid(2000, 10, 0))


def test_whole_groups_stay_together():
    groups = ["a"] * 50 + ["b"] * 30 + ["c"] * 20
    parts = by_column(groups, 2)
    assert sorted(len(part) for part in parts) == [50, 50]


@pytest.mark.parametrize(
    ("rule", "clients", "message"),
    [("iid", 0, "at least 1"), ("column", 3, "2 values for 3"), ("rows", 2, "unknown")],
)
def test_impossible_partitions_are_refused(rule, clients, message):
    with pytest.raises(ConfigError, match=message):
        partition(rule, np.zeros(4, np.int64), ["x", "x", "y", "y"], clients)


@pytest.mark.parametrize(("count", "clients"), [(96, 10), (100, 10), (400, 30), (25, 10)])
def test_too_few_rows_name_a_number_of_clients_that_fits(count, clients):
    labels = np.arange(count) % 3
    with pytest.raises(ConfigError) as refused:
        partition("dirichlet", labels, [], clients)
    found = re.search(r"--clients (\d+)$", str(refused.value))
    assert found and 1 <= int(found[1]) < clients
    assert len(partition("dirichlet", labels, [], int(found[1]))) == int(found[1])


def test_too_few_groups_name_the_clients_that_fit():
    labels, groups = np.zeros(96, np.int64), ["x", "y", "z"] * 32
    with pytest.raises(ConfigError, match="--clients 3, or"):
        partition("column", labels, groups, 10)
    assert len(partition("column", labels, groups, 3)) == 3


def test_the_table_of_built_in_sets_is_complete():
    assert {"reuters-r8", "election", "sms", "tweets", "imdb"} <= set(BUILT_IN)


@pytest.mark.parametrize(
    ("held", "count"), [(0.0, 0), (0.001, 1), (0.25, 10), (7.0, 7), (39.0, 39)]
)
def test_rows_held_out_are_a_clients_own_and_never_trained_on(held, count):
    rows = np.arange(100, 140)
    kept, out = hold_out(rows, held, (3, 1))
    assert len(out) == count and np.array_equal(np.sort([*kept, *out]), rows)
    again, other = hold_out(rows, held, (3, 1)), hold_out(rows, held, (3, 2))
    assert np.array_equal(out, again[1])
    assert count in (0, 39) or not np.array_equal(out, other[1])


def test_a_client_cannot_hold_out_all_its_rows():
    with pytest.raises(ConfigError, match="held-out = 40 takes all 40 rows of a client; lower it"):
        hold_out(np.arange(40), 40.0, (0,))
    with pytest.raises(
        ConfigError, match=r"held-out = 1\.5; a share of a client's rows below 1, or"
    ):
        configure(held_out=1.5)

import csv
import gzip
import json

import pytest

from client.config import DEFAULTS, configure, task_config
from client.instructions.generation import last_number
from client.instructions.sources import holds_conversations, load_conversations
from client.tasks.table import find_task
from dare_agg.errors import ConfigError

ROWS = [
    {"prompt": f"how many, {n}?", "answer": f"«{n}»\nleft", "by": f"a{n % 2}"} for n in range(6)
]
TALKS = [(("user", row["prompt"]), ("assistant", row["answer"])) for row in ROWS]


def messages(row):
    return [
        {"role": "user", "content": row["prompt"]},
        {"role": "assistant", "content": row["answer"]},
    ]


def write_csv(path, rows, *, delimiter=",", encoding="utf-8"):
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def as_parquet(path, rows):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def as_folder(path, rows):
    import datasets

    datasets.Dataset.from_list(rows).save_to_disk(str(path))
    return path


def json_lines(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def packed(path, rows):
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    return path


TALKED = [{"messages": messages(row), "by": row["by"]} for row in ROWS]
AS_TEXT = [{"messages": json.dumps(messages(row)), "by": row["by"]} for row in ROWS]
FILES = {
    "csv": lambda p: write_csv(p / "a.csv", ROWS),
    "semicolons": lambda p: write_csv(p / "a.csv", ROWS, delimiter=";"),
    "utf-16": lambda p: write_csv(p / "a.csv", ROWS, encoding="utf-16"),
    "csv with messages": lambda p: write_csv(p / "a.csv", AS_TEXT),
    "tsv with messages": lambda p: write_csv(p / "a.tsv", AS_TEXT, delimiter="\t"),
    "json lines": lambda p: json_lines(p / "a.jsonl", TALKED),
    "json lines of pairs": lambda p: json_lines(p / "a.ndjson", ROWS),
    "packed": lambda p: packed(p / "a.jsonl.gz", TALKED),
    "a json list": lambda p: _json_list(p / "a.json"),
    "parquet": lambda p: as_parquet(p / "a.parquet", TALKED),
    "parquet of pairs": lambda p: as_parquet(p / "a.parquet", ROWS),
    "a datasets folder": lambda p: as_folder(p / "a", TALKED),
}


def _json_list(path):
    path.write_text(json.dumps(TALKED, indent=1), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", FILES)
def test_every_form_holds_the_same_conversations_and_auto_knows_it(kind, tmp_path):
    config = configure(data=str(FILES[kind](tmp_path)), partition_by="by")
    (train, test), _ = load_conversations(config)
    assert [row[0] for row in train] == TALKS and test is None
    assert {row[1] for row in train} == {"a.jsonl" if kind == "packed" else "a"}
    assert [row[2] for row in train] == [row["by"] for row in ROWS]
    assert find_task(config).name == "instructions"


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("beside", [{}, {"tools": [], "meta": {"a": 1}}])
def test_one_conversation_alone_is_one_row_and_no_list_of_turns(indent, beside, tmp_path):
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps({"messages": messages(ROWS[0]), **beside}, indent=indent))
    (train, _), _ = load_conversations(configure(data=str(path)))
    assert [row[0] for row in train] == TALKS[:1]
    columns = {"messages": [messages(row) for row in ROWS]}  # a list a column, as before
    path.write_text(json.dumps(columns, indent=indent))
    (train, _), _ = load_conversations(configure(data=str(path)))
    assert [row[0] for row in train] == TALKS


def test_other_columns_are_named(tmp_path):
    rows = [{"instruction": r["prompt"], "output": r["answer"], "kind": "sum"} for r in ROWS]
    path = str(write_csv(tmp_path / "a.csv", rows))
    named = configure(
        data=path, prompt_column="instruction", answer_column="output", label_column="kind"
    )
    assert holds_conversations(named) and not holds_conversations(configure(data=path))
    (train, _), _ = load_conversations(named)
    assert [row[0] for row in train] == TALKS and {row[1] for row in train} == {"sum"}
    with pytest.raises(ConfigError, match=r"no column 'prompt'.*no column 'messages'; name pr"):
        load_conversations(configure(data=path))
    lines = str(json_lines(tmp_path / "b.jsonl", rows))
    with pytest.raises(ConfigError, match="and no column 'messages'"):
        load_conversations(configure(data=lines))


def test_columns_are_a_nodes_own_or_one_for_each_source():
    node = {"prompt-column": "q", "answer-column": "a"}
    mine = task_config({**DEFAULTS, "prompt-column": "question"}, node)
    assert (mine.prompt_column, mine.answer_column) == ("q", "a")
    run = {**DEFAULTS, "data": "a.csv,b.csv", "prompt-column": "q,question"}
    told = [task_config(run, {"partition-id": place}) for place in (0, 1)]
    assert [(one.prompt_column, one.answer_column) for one in told] == [
        ("q", "answer"), ("question", "answer")
    ]  # fmt: skip


def test_a_datasets_name_keeps_its_test_split(tmp_path):
    import datasets

    whole = datasets.DatasetDict(
        train=datasets.Dataset.from_list(TALKED), test=datasets.Dataset.from_list(TALKED[:2])
    )
    whole.save_to_disk(str(tmp_path / "a"))
    config = configure(data=str(tmp_path / "a"))
    (train, test), _ = load_conversations(config)
    assert len(train) == 6 and [row[0] for row in test] == TALKS[:2]
    assert holds_conversations(config)


def test_rows_that_teach_nothing_are_left_out_and_counted(tmp_path):
    rows = [*ROWS, {**ROWS[0], "answer": " "}, {**ROWS[0], "prompt": ""}, dict(ROWS[0])]
    path = write_csv(tmp_path / "a.csv", rows)
    (train, _), notes = load_conversations(configure(data=str(path)))
    assert [row[0] for row in train] == [*TALKS, TALKS[0]]
    assert "2 of 9 rows are left out: 1 without a question (first: line " in notes[0]
    assert "1 an empty answer (first: line " in notes[0]
    assert "1 of 7 rows repeat an earlier one, and are kept" in notes[1]


def test_where_no_answer_is_left_it_is_refused(tmp_path):
    path = write_csv(tmp_path / "a.csv", [{**row, "answer": ""} for row in ROWS])
    with pytest.raises(ConfigError, match="no row to learn from: of 6 rows 6 an empty answer"):
        load_conversations(configure(data=str(path)))


def test_a_bad_cell_is_named_by_its_line(tmp_path):
    path = write_csv(tmp_path / "a.csv", [*AS_TEXT[:2], {"messages": "hello", "by": "x"}])
    with pytest.raises(ConfigError, match="line 4, column 'messages' is no JSON list"):
        load_conversations(configure(data=str(path)))


def test_system_prompts_reach_every_conversation_without_one(tmp_path):
    own = {"messages": [{"role": "system", "content": "Own."}, *messages(ROWS[0])]}
    path = json_lines(tmp_path / "a.jsonl", [own, *TALKED[1:]])
    (train, _), _ = load_conversations(configure(data=str(path), system_prompt="Count."))
    assert [row[0][0][1] for row in train] == ["Own."] + ["Count."] * 5


def test_what_is_no_conversation_is_left_to_other_tasks(tmp_path):
    path = write_csv(tmp_path / "a.csv", [{"text": "a", "label": "b"}])
    (tmp_path / "book.txt").write_text("prompt,answer")
    for data in (path, tmp_path / "book.txt", tmp_path, tmp_path / "nowhere.csv", "reuters-r8"):
        assert not holds_conversations(configure(data=str(data)))
    with pytest.raises(ConfigError, match="a kind that holds no conversations"):
        load_conversations(configure(data=str(tmp_path / "book.txt")))
    with pytest.raises(ConfigError, match=r"nowhere.csv' does not exist"):
        load_conversations(configure(data=str(tmp_path / "nowhere.csv")))


def test_arithmetic_is_made_on_the_spot_the_same_for_one_seed():
    config = configure(data="arithmetic", seed=3)
    assert find_task(config).name == "instructions"
    (train, test), _ = load_conversations(config)
    (again, _), _ = load_conversations(config)
    (other, _), _ = load_conversations(configure(data="arithmetic", seed=4))
    assert train == again != other and test and train[0][1] == "arithmetic"
    assert not {row[0] for row in test} & {row[0] for row in train}
    (worked, _), _ = load_conversations(configure(data="arithmetic-worked", seed=3))
    for (question, answer), (other, equation) in zip(
        (row[0] for row in train[:50]), (row[0] for row in worked[:50]), strict=True
    ):
        assert question == other and equation[1].endswith(f"={answer[1]}")
        assert last_number(equation[1]) == last_number(answer[1])

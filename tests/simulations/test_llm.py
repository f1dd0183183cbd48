"""The benchmark of large models, on a small one: real strategy, real clients, two processes."""

import json

import pytest

from simulations.bench import llm
from simulations.runs.far_grid import FarGrid

_WORDS = """
import json, sys
from flwr.app import MetricRecord, RecordDict, Message
from simulations.runs.far_grid import serve
class Echo:
    trained_seconds = 0.0
    def __call__(self, message, context):
        self.trained_seconds = 1e-9
        said = {"partition": int(context.node_config["number"]), "bytes": len(message.content)}
        return Message(RecordDict({"said": MetricRecord(said)}), reply_to=message)
serve(Echo(), lambda number: {"number": number})
"""


def test_messages_reach_the_clients_of_another_process_and_their_answers_come_back():
    import sys

    from flwr.app import ArrayRecord, Message, RecordDict

    from simulations.runs.memory_grid import pretend_task

    pretend_task()
    with FarGrid([sys.executable, "-c", _WORDS], 3) as grid:
        content = RecordDict({"arrays": ArrayRecord()})
        nodes = list(grid.get_node_ids())
        messages = [Message(content, node, "train") for node in nodes]
        replies = grid.send_and_receive(messages)
    said = {reply.metadata.src_node_id: reply.content["said"] for reply in replies}
    assert {node: record["partition"] for node, record in said.items()} == grid.partitions
    assert [answer["trained"] for answer in grid.answers] == [True] * 3
    assert grid.before["own_bytes"] > 0 and grid.peak.own > 0


@pytest.mark.slow
def test_a_point_is_run_once_and_its_row_says_what_was_asked_for(tmp_path, capsys, monkeypatch):
    rows = tmp_path / "rows.jsonl"
    words = ["llm", "--points", "tiny", "--folder", str(tmp_path), "--out", str(rows), "--json"]
    monkeypatch.setattr("sys.argv", words)
    llm.main()
    llm.main()
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert (row["parameters"], row["clients"], row["rounds"]) == (200_000, 4, 3)
    assert row["server_anonymous_mib"] < 200 and row["client_extra_mib"] < 200
    # A hundredth of the elements, a bit each, and all of the round's down.
    assert row["upload_bytes"] < 1000 and row["download_bytes"] < 3000
    assert row["server_cpu_seconds"] > 0 and row["client_cpu_seconds"] > 0
    assert 3 <= row["disk_bytes"] < 7  # room is taken in pieces of 256 KiB
    assert not list(tmp_path.glob("dare-llm-*"))

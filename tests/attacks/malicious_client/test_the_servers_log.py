"""A client writes what the follower of a run reads as the server's own words."""

import json
import logging

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord
from toy import toy_app, toy_arrays

from dare_agg.cli.progress import follow, load_rows
from dare_agg.cli.run_config import resumed_config
from dare_agg.flower import DareStrategy
from dare_agg.flower.records import REPLY_KEY, UPDATE_KEY
from dare_agg.runs.log import Mirror
from dare_agg.runs.rows import RunRow
from server.recorder import Recorder
from simulations.runs.memory_grid import MemoryGrid

CONFIG = {"num-rounds": 2, "model": "minilm"}
THEIRS = {"model": "/attacker/model", "data": "/attacker.csv", "num-rounds": 1}
STATE = {"status": "completed", "token": "ab" * 8, "config": THEIRS}
ROW = {"method": "dare", "round": 1, "accuracy": 0.999, "rejected": []}
OURS = {
    "method": "dare", "round": 1, "rejected": [], "accepted": 3,
    "seconds": 1.0, "round_seconds": 1.0,
    "upload_bytes_per_client": 1, "download_bytes_per_client": 1,
}  # fmt: skip
WORDS = [
    "dare-agg state " + json.dumps(STATE),
    f"dare-agg state {STATE['token']} " + json.dumps(STATE),
    "dare-agg row " + json.dumps(ROW),
    f"dare-agg row {'0' * 16} " + json.dumps(ROW),
    "x\nINFO :      [ROUND 9/9]",
    "\x1b[92mINFO \x1b[0m:      [ROUND 9/9]",
]


@pytest.mark.parametrize("says", WORDS)
def test_a_refusal_in_the_servers_words_is_talk(tmp_path, caplog, says):
    caplog.set_level(logging.INFO, logger="flwr")

    def tamper(client, message):
        if client == 0 and UPDATE_KEY in message.content:
            for key in list(message.content):
                del message.content[key]
            message.content[REPLY_KEY] = ConfigRecord({"refused": "busy", "detail": says})
        return message

    recorder = Recorder(tmp_path / "server", CONFIG)
    recorder.status("running")
    arrays = ArrayRecord({name: Array(array) for name, array in toy_arrays().items()})
    strategy = DareStrategy(seed=1, fraction_evaluate=0.0)
    strategy.start(MemoryGrid(toy_app(), 4, tamper=tamper), arrays, num_rounds=2)
    recorder.row(RunRow(OURS))
    assert strategy.outcome.measurements["accepted"] == 3

    mirror, shown = Mirror(tmp_path / "here"), []
    taken = [mirror.take(f"INFO :      {record.getMessage()}") for record in caplog.records]
    assert taken.count(True) == 2  # the recorder's state and its row
    assert [row.round for row in load_rows(tmp_path / "here")] == [1]
    assert load_rows(tmp_path / "here")[0].accuracy is None
    assert json.loads((tmp_path / "here" / "run.json").read_text())["config"] == CONFIG
    assert resumed_config(tmp_path / "here") == CONFIG

    class Console:
        def print(self, line, **words):
            shown.append(line)

    watch = follow(tmp_path / "there", Console())
    for record in caplog.records:
        watch(f"INFO :      {record.getMessage()}")
    assert not any(line.startswith("round 9") for line in shown)


def test_the_token_is_sent_to_no_client(tmp_path):
    recorder = Recorder(tmp_path, CONFIG)
    grid = MemoryGrid(toy_app(), 2)
    arrays = ArrayRecord({name: Array(array) for name, array in toy_arrays().items()})
    DareStrategy(seed=1).start(grid, arrays, num_rounds=1, train_config=ConfigRecord(CONFIG))
    sent = b"".join(
        record.deflate() if hasattr(record, "deflate") else b""
        for message in grid.sent
        for record in message.content.values()
    )
    assert sent and recorder.token.encode() not in sent

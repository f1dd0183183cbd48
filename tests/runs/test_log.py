"""Watching a run from elsewhere: the mirror of its folder, time left, Prometheus."""

import itertools
import json
import math
import re
import urllib.request

import pytest

from dare_agg.cli.progress import follow, load_rows
from dare_agg.errors import ConfigError, StateError
from dare_agg.runs.log import Mirror, rejections, row_line, seconds_left, state_line
from dare_agg.runs.now import Now, now_of, read_now
from dare_agg.runs.prometheus import exporter
from dare_agg.runs.report import read_run
from dare_agg.runs.rows import RunRow
from server.recorder import Recorder

TOKEN = "ab" * 8
CONFIG = {"num-rounds": 5, "methods": ["dare-ties"], "model": "minilm", "data": "x"}


def a_row(number, **more):
    return RunRow(
        {
            "method": "dare-ties",
            "round": number,
            "accuracy": 0.5 + number / 10,
            "clients": 2,
            "accepted": 2,
            "rejected": [],
            "upload_bytes": 2000,
            "download_bytes": 4000,
            "upload_bytes_per_client": 1000,
            "download_bytes_per_client": 2000,
            "update_bytes_per_client": 900,
            "dense_bytes_per_client": 100,
            "round_seconds": 10.0,
            "seconds": 10.0 * number,
            **more,
        }
    )


@pytest.fixture
def said(caplog):
    """What the server's recorder put into the log."""
    caplog.set_level("INFO", logger="flwr")
    return lambda: [f"INFO :      {record.getMessage()}" for record in caplog.records]


def test_a_follower_on_another_machine_gets_the_run_folder(tmp_path, said):
    recorder = Recorder(tmp_path / "server", CONFIG)
    recorder.status("running")
    for number in (1, 2):
        recorder.row(a_row(number))
    recorder.now({"method": "dare-ties", "phase": "train", "asked": 2, "waiting": ["a", "b"]})
    recorder.status("completed", fingerprints={"dare-ties": "ab"})
    mirror = Mirror(tmp_path / "here")
    assert all(mirror.take(line) for line in said())
    for name in ("metrics.jsonl", "run.json", "now.json"):
        server = (tmp_path / "server" / name).read_text()
        assert (tmp_path / "here" / name).read_text() == server
    (run,) = read_run(tmp_path / "here")
    assert [one.number for one in run.rounds] == [1, 2] and run.fingerprint == "ab"
    now = read_now(tmp_path / "here", recorder.token)
    assert now.words() == "training, 0 of 2 answered, waiting for a, b"
    # Of another start of the run, and of a file that says anything at all.
    assert read_now(tmp_path / "here", "cd" * 8) is None


def test_a_word_of_another_kind_counts_as_not_said():
    odd = {
        "round": True,
        "asked": -1,
        "answered": "3",
        "waiting": [1, "x"],
        "at": "now",
        "phase": 3,
    }
    assert now_of(odd) == Now(waiting=("x",))
    assert now_of({"asked": 20, "waiting": ["x", "7"]}).words() == (
        "0 of 20 answered, waiting for x, client 7 and 18 more"
    )


def test_the_servers_own_folder_is_left_alone(tmp_path, said):
    recorder = Recorder(tmp_path, CONFIG)
    recorder.status("running")
    recorder.row(a_row(1))
    recorder.now({"phase": "merge"})
    recorder.status("completed")
    before = (tmp_path / "now.json").read_bytes()
    mirror = Mirror(tmp_path)
    for line in said():
        assert mirror.take(line)
    assert (tmp_path / "now.json").read_bytes() == before
    assert load_rows(tmp_path) == [a_row(1)]
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "completed"


def test_a_resumed_run_makes_rounds_again(tmp_path):
    mirror = Mirror(tmp_path)
    mirror.take(state_line({"status": "running", "token": TOKEN, "config": CONFIG}))
    for number in (1, 2, 3, 2, 3):
        mirror.take(row_line(a_row(number), TOKEN))
    assert [row.round for row in load_rows(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize(
    "line",
    ["", "round 3", "dare-agg row {", f"dare-agg state {TOKEN} [1]"],
)
def test_other_lines_and_cut_ones_change_nothing(tmp_path, line):
    Mirror(tmp_path / "here").take(line)
    assert not (tmp_path / "here").exists()


def test_progress_says_who_is_left_out_and_how_long_it_takes(tmp_path):
    said = []

    class Console:
        def print(self, line, **words):
            said.append(line)

    watch = follow(tmp_path, Console())
    watch(state_line({"status": "running", "token": TOKEN, "config": CONFIG}))
    late = {"client": 1, "reason": "late", "detail": "", "name": "south"}
    watch(row_line(a_row(1, accepted=1, rejected=[late]), TOKEN))
    watch(row_line(a_row(2, weights_cut=["north"]), TOKEN))
    line, cut = said
    assert "(weight cut: north)" in cut
    assert "round 1 of 5: accuracy 0.600" in line and "1 left out: south: late" in line
    assert "1.0 kB up and 2.0 kB down" in line and "about 40 s left" in line


def test_seconds_left():
    assert seconds_left([], CONFIG) is None
    assert seconds_left([a_row(1), a_row(2)], CONFIG) == 30
    assert seconds_left([a_row(n) for n in range(1, 6)], CONFIG) == 0
    assert seconds_left([a_row(1)], {}) is None
    assert rejections(a_row(1)) == ""


# Seconds of a round's training and of the whole round, as they were measured or may well be.
TIMED = {
    "simulation": [(19, 24), (8.2, 10), (7.9, 9), (8.5, 10), (8, 9), (8.1, 9)],
    "a deployment over TLS on a busy machine, two clients lost": [
        (44, 237),
        (41, 67),
        (56, 136),
        (31, 64),
        (39, 89),
        (56, 115),
        (60, 98),
        (47, 80),
        (34, 60),
    ],
    "half of it is evaluation": [(13.9, 28.9), (3.9, 5.9), (3.3, 4.9), (3.5, 5.2)],
    "the whole model first": [(300, 310), (20, 24), (18, 22), (22, 25), (19, 23), (21, 24)],
    "a client is lost once": [
        (30, 32),
        (10, 11),
        (120, 121),
        (10, 11),
        (11, 12),
        (10, 11),
        (9, 10),
    ],
    "every third round is evaluated": [(30, 32), *3 * [(10, 10.5), (10, 10.5), (10, 25)]],
    "some clients are slow": [(40, 45), *5 * [(10, 12), (25, 27)]],
}


@pytest.mark.parametrize("what", TIMED)
def test_time_left_is_right_within_a_factor_of_two_from_round_two_on(what):
    ends = list(itertools.accumulate(whole for _, whole in TIMED[what]))
    rows = [
        a_row(number, round_seconds=float(train), seconds=float(end))
        for number, ((train, _), end) in enumerate(zip(TIMED[what], ends, strict=True), 1)
    ]
    config = {**CONFIG, "num-rounds": len(rows)}
    # What is to come nobody knows.
    first = 3 if "lost once" in what else 2
    for number in range(first, len(rows)):
        left, right = seconds_left(rows[:number], config), ends[-1] - ends[number - 1]
        assert abs(math.log2(left / right)) <= 1, (number, left, right)


def test_time_left_of_a_resumed_run_and_of_methods_that_are_still_to_come():
    rows = [a_row(1, seconds=300.0), a_row(2, seconds=310.0)]
    rows += [a_row(3, seconds=30.0, round_seconds=10.0), a_row(4, seconds=40.0)]
    assert seconds_left(rows, CONFIG) == pytest.approx(10)
    two = {**CONFIG, "methods": ["dare-ties", "fedavg"]}
    assert seconds_left(rows, two) == pytest.approx(60)
    dense = [a_row(n, method="fedavg", seconds=n * 40.0, round_seconds=40.0) for n in (1, 2)]
    assert seconds_left([*rows, *dense], two) == pytest.approx(120)


def test_tensorboard(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    recorder = Recorder(tmp_path, CONFIG)
    recorder.row(a_row(1))
    recorder.row(a_row(2))
    recorder.close()
    shown = events.EventAccumulator(str(tmp_path / "tensorboard" / "dare-ties"))
    shown.Reload()
    steps = [
        (event.step, round(float(event.tensor_proto.float_val[0]), 3))
        for event in shown.Tensors("accuracy")
    ]
    assert steps == [(1, 0.6), (2, 0.7)]


def test_prometheus(tmp_path):
    pytest.importorskip("prometheus_client")
    shown = exporter(0)
    recorder = Recorder(tmp_path, CONFIG, shown)
    late = {"client": 1, "reason": "late", "detail": ""}
    recorder.row(a_row(1))
    recorder.row(a_row(2, rejected=[late]))
    with urllib.request.urlopen(f"http://127.0.0.1:{shown.port}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    with pytest.raises(ConfigError, match="cannot be listened on"):
        exporter(shown.port)
    recorder.close()
    for line in (
        'dare_agg_round{method="dare-ties"} 2.0',
        'dare_agg_accuracy{method="dare-ties"} 0.7',
        'dare_agg_bytes_total{direction="upload",method="dare-ties"} 4000.0',
        'dare_agg_rejected_total{method="dare-ties",reason="late"} 1.0',
    ):
        assert line in text
    # It goes on counting between two rounds.
    left = float(re.search(r"^dare_agg_seconds_left (.*)$", text, re.MULTILINE)[1])
    assert 25 < left < 30


def test_a_full_disk_is_named(tmp_path):
    recorder = Recorder(tmp_path, CONFIG)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(StateError, match="No space left on device; finished rounds are kept"):
        recorder.row(a_row(1))

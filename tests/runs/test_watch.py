"""`dare-agg watch` as whoever speaks HTTP sees it: what it answers, to whom, and what it reads."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dare_agg.errors import ConfigError, StateError
from dare_agg.runs.live import check_watched, live_facts, live_line, newest_run
from dare_agg.runs.log import row_line
from dare_agg.runs.rows import RunRow
from dare_agg.runs.watch import serve
from tests.runs.made_run import TOKEN, a_row, made_run, two_methods
from tests.tiny import command

NOW = {
    "method": "dare-ties", "phase": "train", "round": 3, "rounds": 5, "asked": 3, "answered": 1,
    "waiting": ["south", "west"], "at": 1.0,
}  # fmt: skip


class Caller:
    """Speaks to a page as a browser does, or not."""

    def __init__(self, address: str) -> None:
        host, self.key = address.removeprefix("http://").rstrip("/").split("/")
        self.port = int(host.split(":")[1])

    def get(self, path=None, *, method="GET", **headers):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        connection.request(
            method,
            f"/{self.key}/" if path is None else path,
            headers={name.replace("_", "-"): value for name, value in headers.items()},
        )
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        return answer, body


@pytest.fixture
def run(tmp_path):
    rows = [a_row("fedavg", n, 0.5) for n in range(1, 6)]
    late = {"client": 2, "name": "west", "reason": "late", "detail": "no answer"}
    rows += [a_row("dare-ties", n, 0.4, rejected=[late]) for n in (1, 2)]
    log = f"INFO :      hello\n{row_line(RunRow(rows[0]), TOKEN)}\nINFO :      [ROUND 3/5]\n"
    return made_run(tmp_path / "run", rows, now=NOW, log=log)


@pytest.fixture
def page(run):
    with serve(run, 0) as found:
        yield Caller(found.address)


def test_facts_follow_the_folder_and_are_sent_once(page, run):
    answer, body = page.get(f"/{page.key}/facts")
    facts = json.loads(body)
    assert answer.status == 200 and answer.getheader("Content-Type") == "application/json"
    assert facts["live"]["now"] == (
        "DARE TIES, round 3 of 5: training, 1 of 3 answered, waiting for south, west"
    )
    assert facts["live"]["done"] == 7 and facts["live"]["planned"] == 10
    shown = {card["text"]: card["figure"] for card in facts["cards"]}
    assert shown["round"] == "3 of 5" and shown["accuracy, DARE TIES"] == "40.0 %"
    assert shown["up so far, by all clients"] == "3.0 kB"
    assert shown["left"] == "about 30 s"
    states = {row["cells"][0]: row["cells"][-1] for row in facts["clients"][1]["rows"]}
    assert states == {"north": "merged", "south": "waited for now", "west": "waited for now"}
    tag = answer.getheader("ETag")
    again, nothing = page.get(f"/{page.key}/facts", If_None_Match=tag)
    assert again.status == 304 and not nothing
    (run / "now.json").write_text(json.dumps({"token": TOKEN, **NOW, "phase": "merge", "asked": 0}))
    changed, body = page.get(f"/{page.key}/facts", If_None_Match=tag)
    assert changed.status == 200 and json.loads(body)["live"]["now"].endswith(": merging")


def test_the_log_is_shown_without_the_lines_that_carry_measurements(page):
    _, body = page.get(f"/{page.key}/facts")
    log = json.loads(body)["live"]["log"]
    assert log.splitlines() == ["INFO :      hello", "INFO :      [ROUND 3/5]"]
    # Whoever had the run's token could write rows into its log.
    assert TOKEN.encode() not in body


def test_frame_style_and_script_come_with_a_policy_that_admits_nothing_else(page):
    for name, kind in (("", "text/html"), ("page.css", "text/css"), ("page.js", "text/javascript")):
        answer, body = page.get(f"/{page.key}/{name}")
        assert answer.status == 200 and answer.getheader("Content-Type").startswith(kind)
        policy = answer.getheader("Content-Security-Policy")
        assert policy.startswith("default-src 'none'; style-src 'self'; script-src 'self';")
        assert "unsafe" not in policy and "frame-ancestors 'none'" in policy
        assert answer.getheader("X-Content-Type-Options") == "nosniff"
        assert answer.getheader("Cache-Control") == "no-store"
        assert b"http://" not in body.replace(b"http://www.w3.org/2000/svg", b"")
        assert b"https://" not in body


@pytest.mark.parametrize(
    "path",
    [
        "/", "/facts", "/wrong-key/facts", "/{key}/run.json", "/{key}/run.log",
        "/{key}/../run.json",
        "/{key}/%2e%2e/run.json", "/{key}//etc/passwd", "/{key}/facts/..", "/{key}/facts?x=1",
        "/{key}/page.css/../../../records.py", "/{key}", "/{key}/\\..\\run.json",
        "http://127.0.0.1/{key}/facts", "/é/facts",
    ],
)  # fmt: skip
def test_no_other_address_is_answered(page, path):
    path = path.replace("{key}", page.key)
    with socket.create_connection(("127.0.0.1", page.port), timeout=10) as line:
        line.sendall(
            f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
        )
        said = b""
        while piece := line.recv(1 << 16):
            said += piece
    assert said.startswith(b"HTTP/1.1 404 ") and b"Content-Security-Policy" in said
    assert b"accuracy" not in said


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (421, {"Host": "evil.example"}), (421, {"Host": "127.0.0.1.evil.example:80"}),
        (421, {"Host": "localhost:80@evil.example"}), (421, {"Host": ""}),
        (421, {"Host": "[::1]:80"}), (403, {"Origin": "http://evil.example"}),
        (403, {"Origin": "null"}), (403, {"Origin": "http://localhost:1"}),
        (403, {"Sec-Fetch-Site": "cross-site"}), (403, {"Sec-Fetch-Site": "same-site"}),
        (200, {"Host": "localhost:9999"}), (200, {"Sec-Fetch-Site": "same-origin"}),
        (200, {"Host": "localhost:9999", "Origin": "http://localhost:9999"}),
    ],
)  # fmt: skip
def test_another_name_and_another_page_are_refused(page, status, headers):
    answer, body = page.get(f"/{page.key}/facts", **headers)
    assert answer.status == status and (b"accuracy" in body) == (status == 200)


def test_two_names_are_none(page):
    with socket.create_connection(("127.0.0.1", page.port), timeout=10) as line:
        line.sendall(f"GET /{page.key}/ HTTP/1.1\r\nHost: localhost\r\nHost: x\r\n\r\n".encode())
        assert line.recv(100).startswith(b"HTTP/1.1 421 ")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "<script>"])
def test_nothing_is_taken_and_nothing_of_a_request_comes_back(page, method):
    answer, body = page.get(f"/{page.key}/facts", method=method)
    assert answer.status in (400, 501) and body == b"refused\n"
    assert answer.getheader("Content-Security-Policy")


def test_a_head_has_no_body(page):
    answer, body = page.get(f"/{page.key}/facts", method="HEAD")
    assert answer.status == 200 and not body and int(answer.getheader("Content-Length")) > 100


def test_only_loopback_listens(page):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing: asks for this machine's own address
            own = probe.getsockname()[0]
        except OSError:
            own = "127.0.0.2"
    if own == "127.0.0.1":
        own = "127.0.0.2"
    with pytest.raises(OSError):
        socket.create_connection((own, page.port), timeout=2).close()


def test_many_callers_who_say_nothing_leave_room_again(page):
    lines = [socket.create_connection(("127.0.0.1", page.port), timeout=10) for _ in range(60)]
    time.sleep(0.5)
    for line in lines:
        line.close()
    until = time.monotonic() + 10
    while True:
        try:
            assert page.get()[0].status == 200
            return
        except (OSError, http.client.HTTPException):
            assert time.monotonic() < until
            time.sleep(0.1)


@pytest.mark.parametrize("name", ["run.log", "metrics.jsonl", "run.json", "now.json"])
def test_a_link_out_of_the_folder_is_not_read(page, run, tmp_path, name):
    (tmp_path / "secret").write_text('{"status": "top secret"}\n')
    (run / name).unlink()
    (run / name).symlink_to(tmp_path / "secret")
    answer, body = page.get(f"/{page.key}/facts")
    assert answer.status == 409 and b"is a link to elsewhere" in body and b"secret" not in body
    with pytest.raises(StateError, match="is a link"):
        check_watched(run)


def test_a_port_that_is_taken_is_said_with_a_remedy(run, capsys):
    with serve(run, 0) as first:
        port = Caller(first.address).port
        with pytest.raises(ConfigError, match=f"port {port} of 127.0.0.1 cannot be listened on"):
            serve(run, port).__enter__()
        status, said = command(capsys, "watch", run, "--port", port)
    assert status == 1 and "give another one, or 0" in said


def test_a_run_with_a_page_does_not_begin_where_the_port_is_taken(run, tmp_path, capsys):
    with serve(run, 0) as first:
        words = ("run", "--watch", "--watch-port", Caller(first.address).port, "-o", tmp_path / "n")
        status, said = command(capsys, *words)
    assert status == 1 and "cannot be listened on" in said and not (tmp_path / "n").exists()


def test_a_folder_that_begins_and_half_a_file(tmp_path):
    facts = live_facts(tmp_path / "none")
    assert facts["live"]["state"] == "nothing has begun yet" and not facts["series"]
    folder = made_run(tmp_path / "run", [a_row("fedavg", 1, 0.5)])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"method": "fedavg", "rou')
    assert live_facts(folder)["live"]["done"] == 1
    (folder / "run.json").write_text('{"status": "runn')
    assert "no JSON" in live_facts(folder)["live"]["error"]
    made_run(folder, [])
    (folder / "metrics.jsonl").write_text("nonsense\n{}\n")
    assert "line 1 is not JSON" in live_facts(folder)["live"]["error"]


def test_how_a_run_ended_is_said_and_what_it_did_last_no_more(tmp_path):
    folder = two_methods(tmp_path / "run", status="failed", now=NOW)
    state = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**state, "error": "no client\x1b[31m came"}))
    facts = live_facts(folder)
    assert facts["live"]["state"] == "failed" and facts["live"]["error"] == "no client came"
    assert facts["live"]["now"] == "8 rounds were finished"
    line = live_line(facts)
    assert line.startswith("failed · no client came · 8 rounds were finished · 80.0 % accuracy")
    assert "left" not in line and "\n" not in line
    (folder / "run.json").write_text(json.dumps({**state, "error": "failed"}))
    assert live_line(live_facts(folder)).startswith("failed · 8 rounds were finished")


def test_who_waits_for_clients_says_so_and_talk_of_a_client_does_not(tmp_path):
    log = "INFO :      waiting for clients (1 of 2 online, for 12 s)\n"
    folder = made_run(tmp_path / "a", [], log=log)
    assert live_facts(folder)["live"]["now"] == "waiting for clients (1 of 2 online, for 12 s)"
    talk = "WARNING :   client x: INFO : waiting for clients (9 of 9 online)\n"
    assert (
        live_facts(made_run(tmp_path / "b", [], log=talk))["live"]["now"]
        == "before the first round"
    )


def test_the_newest_run_is_the_one_written_to_last(tmp_path, monkeypatch, capsys):
    assert newest_run(tmp_path) is None
    monkeypatch.chdir(tmp_path)
    status, said = command(capsys, "watch")
    assert status == 1 and "no run is in this folder" in said
    for age, name in enumerate(("runs/new", "dare-agg-demo/run", "runs/old")):
        folder = two_methods(tmp_path / name)
        for file in folder.iterdir():
            os.utime(file, (1e9 - age, 1e9 - age))
    assert newest_run(tmp_path) == tmp_path / "runs/new"
    assert newest_run(tmp_path / "runs/old") == tmp_path / "runs/old"
    status, said = command(capsys, "watch", "nowhere")
    assert status == 1 and "is no folder" in said


def test_ctrl_c_ends_the_page_and_is_no_failure(run: Path):
    words = [sys.executable, "-m", "dare_agg.cli.main", "watch", str(run), "--port", "0"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines = [process.stderr.readline() for _ in range(3)]
        assert lines[1].startswith("Page: http://127.0.0.1:")
        assert "round 3 of 5: training, 1 of 3 answered" in lines[2]
        assert Caller(lines[1].split()[1]).get()[0].status == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 0
        assert "the run goes on" in process.stderr.read()

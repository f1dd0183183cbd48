"""A buffer on real SuperNodes: one is slow, the server is killed, and the record makes it again."""

from __future__ import annotations

from pathlib import Path

import pytest

from dare_agg.rounds.arrivals import read_events
from simulations.bench.federation import finished_rounds, read_report

NAMES = ("east", "north", "south", "west")
MERGES = 5
RUN = {"num_rounds": MERGES, "buffer": 2, "size": 50_000, "deadline": 900.0}


@pytest.mark.timeout(2400)
@pytest.mark.federation
@pytest.mark.slow
def test_merges_do_not_wait_for_a_slow_node_and_survive_kill_9(federation, tmp_path: Path) -> None:
    fed = federation(names=list(NAMES))
    fed.start_superlink()
    for name in NAMES:
        fed.register(name)
        # Ten times as slow as the others, with what a message takes besides.
        fed.node_config = {"pause": 20.0 if name == "south" else 0.5}
        fed.start_node(name)
    out = tmp_path / "out"
    fed.submit(out, **RUN)
    fed.wait_for(lambda: finished_rounds(out) >= 1, 900)
    assert fed.kill_9_server_apps() == 1
    done, record = finished_rounds(out), out / "buffer" / "arrivals.jsonl"
    before = read_events(record)
    accepted = {event.number for event in before if event.kind == "answer"}
    fed.submit(out, resume=True, **RUN)
    fed.wait_for(lambda: read_report(out) is not None, 900)
    report = read_report(out)
    assert report["resumed_after"] == done
    rows = report["rounds"]
    assert [row["accepted"] for row in rows] == [2] * (MERGES - done)
    assert not any(row["rejected"] for row in rows)
    # Who is slow is waited for by nobody.
    events = read_events(record)
    names = {event.number: event.client for event in events if event.kind == "ask"}
    answers = [names[event.number] for event in events if event.kind == "answer"]
    assert answers.count("south") < min(map(answers.count, ("east", "north", "west")))
    # What was under way is lost and nothing else, and signed updates count as in rounds.
    lost = {event.number for event in events if event.kind == "lost"}
    assert lost and not lost & accepted
    # Only steps travel to whoever comes back.
    assert max(nbytes for row in rows[1:] for nbytes in row["download_bytes"]) < RUN["size"]
    # The same bits, from the record, where all are as fast.
    again = tmp_path / "again"
    fed.stop("south")
    fed.node_config = {"pause": 0.0}
    fed.start_node("south")
    fed.submit(again, arrivals=str(record), **RUN)
    fed.wait_for(lambda: read_report(again) is not None, 900)
    assert read_report(again)["version"] == report["version"]

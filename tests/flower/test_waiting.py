"""What is said while too few clients are online."""

from __future__ import annotations

import pytest

from dare_agg.cli.progress import follow
from dare_agg.errors import RunError
from dare_agg.flower import DareStrategy, clients, waiting
from dare_agg.flower.clients import Client, Clients
from dare_agg.flower.waiting import Waiting
from dare_agg.rounds.messages import Hello


class Console:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def print(self, line: str, **words: object) -> None:
        self.lines.append(line)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch):
    now = [1000.0]
    monkeypatch.setattr(waiting.time, "monotonic", lambda: now[0])
    return now


def test_it_is_said_at_once_and_then_ever_more_rarely(clock, caplog, tmp_path) -> None:
    caplog.set_level("INFO", logger="flwr")
    for_five = Waiting(5, began=clock[0])
    # Two are there; a third comes after 100 s; an hour passes.
    for second in range(3600):
        clock[0] = 1000.0 + second
        for_five.say(2 if second < 100 else 3, 1 if second >= 100 else 0)
    said = [record.getMessage() for record in caplog.records]
    assert said[:4] == [
        "waiting for clients (2 of 5 online, for 5 s)",
        "waiting for clients (2 of 5 online, for 15 s)",
        "waiting for clients (2 of 5 online, for 35 s)",
        "waiting for clients (2 of 5 online, for 75 s)",
    ]
    assert said[4] == "waiting for clients (3 of 5 online, 1 refused, for 100 s)"
    assert len(said) < 14
    # The terminal of whoever follows the run shows each.
    console = Console()
    watch = follow(tmp_path, console)  # type: ignore[arg-type]
    for line in said:
        watch(f"\x1b[92mINFO \x1b[0m:      {line}")
    assert console.lines == [f"{line} …" for line in said]
    watch("INFO :      client says: waiting for clients (1 of 2 online, for 9 s) or so")
    assert len(console.lines) == len(said)


def test_clients_that_come_and_go_do_not_flood_the_log(clock, caplog) -> None:
    caplog.set_level("INFO", logger="flwr")
    for_five = Waiting(5, began=clock[0])
    for second in range(600):
        clock[0] = 1000.0 + second
        for_five.say(second % 3)
    assert len(caplog.records) <= 600 / waiting.SILENT_SECONDS


@pytest.mark.parametrize("silent", [0.1, 60.0])
def test_a_strategy_says_it_when_it_takes_long(
    memory_grid, toys, caplog, monkeypatch, silent: float
) -> None:
    caplog.set_level("INFO", logger="flwr")
    monkeypatch.setattr(waiting, "SILENT_SECONDS", silent)
    monkeypatch.setattr(clients, "WAIT_SECONDS", 0.1)
    strategy = DareStrategy(min_available_nodes=3, node_timeout=1.0)
    with pytest.raises(RunError, match="2 of the 3 clients needed are online"):
        strategy.start(memory_grid(toys.app(), 2), toys.record(toys.arrays()), num_rounds=1)
    assert ("waiting for clients (2 of 3 online, for" in caplog.text) == (silent < 1)


def test_clients_that_went_away_and_nodes_turned_away_are_known() -> None:
    hellos = {1: "north", 2: "south", 3: "east", 4: "south"}
    met = Clients(
        known={node: Client(node, Hello(name=name)) for node, name in hellos.items()},
        refused={5: "signature: unknown", 6: "package: other"},
        # South came back as another node; node 6 is gone.
        online=[1, 4, 5],
    )
    assert met.away() == ["east"]
    assert met.turned_away() == [{"name": "node 5", "detail": "signature: unknown"}]

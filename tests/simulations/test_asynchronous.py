"""The virtual clock, machines and crowds on it, rounds and buffers, and a small day."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from dare_agg.errors import ConfigError
from simulations.pages.asynchronous import clock_table, day_table, seconds_to
from simulations.runs import asynchronous, many_clients, small_classifier
from simulations.runs.clock import Clock
from simulations.runs.crowd import Crowd
from simulations.runs.machines import MESSAGE_BYTES, make_machines
from simulations.runs.scenario import KINDS
from simulations.runs.small_classifier import Rows


@pytest.fixture(autouse=True)
def few_clothes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made-up pictures of ten kinds in place of Fashion-MNIST's, which need not be here."""
    rng = np.random.default_rng(0)
    kinds = rng.normal(0, 1, (small_classifier.CLASSES, small_classifier.SIDE**2))

    def rows(count: int) -> Rows:
        labels = np.arange(count) % small_classifier.CLASSES
        inputs = kinds[labels] + rng.normal(0, 1.5, (count, kinds.shape[1]))
        return Rows(inputs.astype(np.float32), labels)

    made = {"train": rows(1500), "t10k": rows(300)}
    monkeypatch.setattr(small_classifier, "_rows", lambda part, half: made[part])
    # Not so many that nothing is left to learn.
    monkeypatch.setattr(small_classifier, "PUBLIC_ROWS", 30)
    monkeypatch.setattr(many_clients, "PUBLIC_ROWS", 30)


def run(seed: int = 0, **words):
    settings = {
        **KINDS["asynchronous"][1], "hidden": 16, "steps": 4, "rounds": 6, "hours": 0.4, **words,
    }  # fmt: skip
    return asynchronous.run_row(SimpleNamespace(settings=settings, seed=seed))


def test_events_come_in_the_order_of_time_and_of_being_set():
    clock: Clock[str] = Clock()
    for seconds, name in ((2, "b"), (1, "a"), (2, "c")):
        clock.after(seconds, name)
    assert [clock.next(), clock.next()] == ["a", "b"] and clock.now == 2
    clock.after(0, "d")
    assert [clock.next(), clock.next(), len(clock)] == ["c", "d", 0]
    with pytest.raises(ConfigError, match="at least 0"):
        clock.after(-1, "back in time")


def test_the_slow_take_ten_times_as_long_for_everything():
    machines = make_machines(10, 3, 10.0, 60.0, 300.0, seed=1)
    slow = [machine for machine in machines if machine.training == 600]
    assert len(slow) == 3 and all(machine.line == 3750 for machine in slow)
    quick = next(machine for machine in machines if machine.training == 60)
    assert quick.line == 37_500
    bare = quick.turn_seconds(1, 0, 0)
    assert 40 < bare < 90 and bare != quick.turn_seconds(2, 0, 0)
    assert quick.turn_seconds(1, 30_000, 7_500) == pytest.approx(bare + 1)
    assert quick.turn_seconds(1, 37_500 - MESSAGE_BYTES, 0) - bare < 1


def test_a_crowd_comes_and_goes_as_its_seed_says():
    def day(seed: int) -> list[int]:
        crowd, clock = Crowd(300, 3600, 3 * 3600, seed), Clock[tuple[int, bool]]()
        for seconds, client, comes in crowd.first():
            assert crowd.is_here(client) != comes
            clock.after(seconds, (client, comes))
        counts = [len(crowd.present)]
        while clock.now < 86_400:
            client, comes = clock.next()
            if comes:
                assert not crowd.is_here(client)
                seconds, comes = crowd.come(client, clock.now)
                assert crowd.is_here(client) == comes
            else:
                seconds = crowd.leave(client)
                assert not crowd.is_here(client)
            clock.after(seconds, (client, not comes))
            counts.append(len(crowd.present))
            assert crowd.is_here(crowd.drawn())
        return counts

    assert day(1) == day(1) != day(2)
    assert 30 < np.mean(day(1)) < 90  # a quarter, fewer by day
    assert len(set(day(1))) > 10


def test_rounds_without_drops_are_fedavg_and_as_long_as_the_slowest():
    found = run(way="rounds", drop_rate="0", values="f32", downlink="full", rounds=2)
    base, dealt = small_classifier.base_and_clients(0, 10, 0.5, 16)
    machines = make_machines(10, 3, 10.0, 60.0, 300.0, 0)
    arrays, seconds, size = base, 0.0, sum(array.size for array in base.values())
    for number in (1, 2):
        tuned = [
            small_classifier.train(arrays, rows, 4, 32, 0.1, [0, 4, client, number])
            for client, rows in enumerate(dealt)
        ]
        weights = [len(rows) / sum(map(len, dealt)) for rows in dealt]
        arrays = {
            name: np.asarray(
                sum(w * one[name] for w, one in zip(weights, tuned, strict=True)), np.float32
            )
            for name in arrays
        }
        sent = round(found["bytes_an_update"])
        seconds += max(m.turn_seconds(number, 4 * size, sent) for m in machines)
    last = found["curve"][-1]
    assert last["seconds"] == pytest.approx(seconds, abs=0.2)
    scored = small_classifier.accuracy(arrays, small_classifier.rows_of("t10k"))
    assert last["accuracy"] == pytest.approx(scored, abs=0.011)
    assert 4 * size < sent < 4 * size + 300


def test_rounds_that_do_not_wait_for_the_slow_are_shorter():
    all_of_them, seven = run(way="rounds"), run(way="rounds", wait=7)
    assert seven["updates"] == 42 and all_of_them["updates"] == 60
    assert 5 * seven["curve"][-1]["seconds"] < all_of_them["curve"][-1]["seconds"]


def test_a_buffer_merges_many_times_in_a_round_over_the_same_bytes_an_update():
    rounds, buffer = run(way="rounds"), run(way="buffer")
    assert buffer["bytes_an_update"] == rounds["bytes_an_update"]
    one_round = rounds["curve"][0]["seconds"]
    assert sum(point["seconds"] < one_round for point in buffer["curve"]) > 8
    assert buffer["curve"][-1]["seconds"] > 0.4 * 3600 - 700
    assert buffer["staleness"]["largest"] > 5  # a slow client's first
    assert buffer["accuracy"] > 0.5 > buffer["curve"][0]["accuracy"] - 0.3
    assert run(way="buffer") == buffer != run(way="buffer", seed=1)


def test_an_update_that_is_too_old_does_not_count():
    assert run(way="buffer", max_staleness=3)["lost"] >= 3
    assert run(way="buffer", max_staleness=1000)["lost"] == 0


def test_a_way_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="did you mean 'buffer'"):
        run(way="bufer")


def day(**words):
    settings = {
        **KINDS["many-clients"][1], "clients": 150, "hours": 2, "at_once": 16, "buffer": 8,
        **words,
    }  # fmt: skip
    return many_clients.run_row(SimpleNamespace(settings=settings, seed=0))


def test_a_day_accounts_for_every_plan_and_repeats():
    found = day()
    counts = found["counts"]
    assert sum(counts.values()) - counts["left"] == found["answers"] >= 8 * found["merges"]
    assert counts["left"] > 3 and found["merges"] > 10 and found["clients_met"] > 30
    # What the server holds at once does not follow from who was ever there.
    assert found["most_open"] <= 16 + 8
    assert found["hours"][-1]["kept_steps_bytes"] <= 16_384
    timed = ("seconds_a_merge", "server_seconds_a_merge")
    again = day()
    for one in (found, again):
        for key in timed:
            assert np.min(one.pop(key)) > 0
        assert all(hour.pop("own_mib") > 10 for hour in one["hours"])
    assert again == found


def test_a_lie_about_the_weight_counts_as_far_as_the_bound_lets_it():
    honest = day(alpha=5.0)["accuracy"]
    lies = {"liars": 0.2, "flip": True, "alpha": 5.0}
    unbound = day(**lies, weight_bound=0.0)["accuracy"]
    bound = day(**lies, weight_bound=1.0)["accuracy"]
    assert unbound < honest - 0.2 and bound > unbound + 0.2


def test_the_tables_tell_the_ratio_of_each_seed():
    def row(cell: str, seed: int, seconds: list[float], scores: list[float]) -> dict:
        curve = [{"seconds": s, "accuracy": a} for s, a in zip(seconds, scores, strict=True)]
        return {"cell": cell, "seed": seed, "curve": curve, "bytes_an_update": 708.0}

    rising = [0.5, 0.6, 0.7, 0.8, 0.8, 0.8]
    rows = [
        row("FedAvg, rounds", 0, [3600.0 * n for n in range(1, 7)], rising),
        row("DARE, rounds", 0, [3000.0 * n for n in range(1, 7)], rising),
        row("DARE, buffer", 0, [600.0 * n for n in range(1, 7)], rising),
        row("never", 0, [600.0 * n for n in range(1, 4)], rising[:3]),
        row("FedAvg, rounds; alike", 0, [3600.0 * n for n in range(1, 4)], rising[:3]),
        row("DARE, rounds; alike", 0, [1800.0 * n for n in range(1, 4)], rising[:3]),
    ]
    assert seconds_to(rows[0]["curve"], 0.79) == 6 * 3600
    assert seconds_to(rows[0]["curve"], 0.76) == 5 * 3600
    text = clock_table(rows)
    assert "| DARE, buffer | 80.0 | 1.0 | 1.00 | 6.0× | 5.0× | 708 B | 1 |" in text
    assert "| DARE, rounds; alike | 60.0 | 1.5 | 1.50 | 2.0× | 1.0× | 708 B | 1 |" in text
    assert "| never | 60.0 | 0.5 | not reached | – | – | 708 B | 1 |" in text


def test_the_day_is_told_with_its_memory():
    hours = [{"own_mib": 80.0 + n, "accuracy": 0.8} for n in range(4)]
    row = {
        "cell": "all honest", "seed": 0, "accuracy": 0.8, "clients_met": 7000, "answers": 13000,
        "counts": {"left": 20}, "merges": 260, "merges_a_minute": 0.18,
        "seconds_a_merge": [0.02, 0.03, 0.1], "server_seconds_a_merge": 0.2, "most_open": 150,
        "hours": hours,
    }  # fmt: skip
    text = day_table([row])
    assert "| 7,000 | 13,000 | 20 | 260 | 0.18 | 0.020, 0.030 | 300 | 81 → 83 | 150 | 1 |" in text


def test_a_real_run_is_there_when_thirty_updates_in_a_row_are_good_enough():
    from simulations.bench.asynchronous.__main__ import seconds_to as real_seconds_to

    def curve(accepted: int, scores: list[float]) -> list[dict]:
        return [
            {"seconds": 10.0 * n, "accepted": accepted, "accuracy": score}
            for n, score in enumerate(scores, 1)
        ]

    scores = [0.9, 0.5, 0.8, 0.8, 0.8, 0.8, 0.8]
    assert real_seconds_to(curve(10, scores), 0.7) == 30  # three rounds of ten
    assert real_seconds_to(curve(5, scores), 0.76) == 60  # six merges of five
    assert real_seconds_to(curve(5, scores[:5]), 0.1) is None

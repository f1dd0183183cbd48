"""kill -9 at random moments in a real federation: does every run end with the same bits?

``python -m simulations.bench.crash`` starts a SuperLink with a database and process isolation,
a SuperExec and two SuperNodes over TLS, runs the small app of ``tests/apps/edge`` again and
again and kills, at random moments, the ServerApp, the SuperLink, or everything. What was killed
is started again; a run that died with it is resumed. Every run must end at the fingerprint of
an undisturbed run. Appends one row a finished run to ``results/crash.jsonl`` and goes on from
there when called again, until all runs together were killed ``--kills`` times. (A SuperNode
killed alone costs its update of the round and so changes the result: tests/federation shows that.)
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from simulations.bench.federation import Federation, calm_report, finished_rounds, read_report
from simulations.runs.rows import RESULTS, append_row

TARGETS = ("serverapp", "superlink", "everything")
ROUNDS = 6
CONFIG = {"num_rounds": ROUNDS, "size": 20_000, "pause": 0.5, "deadline": 600.0}
RUN_SECONDS = 1800


def main() -> None:
    """Entry point; the exit status is 1 when a run did not end at the undisturbed bits."""
    parser = argparse.ArgumentParser(prog="python -m simulations.bench.crash", description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="in all rows of the file")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=120, help="Begin no run after so long.")
    parser.add_argument("--out", type=Path, default=RESULTS / "crash.jsonl")
    options = parser.parse_args()
    if len(killed(read_rows(options.out))) < options.kills:
        with tempfile.TemporaryDirectory(prefix="dare-crash-") as folder:
            disturb(Path(folder), options.out, options.kills, options.seed, 60 * options.minutes)
    rows = read_rows(options.out)
    print(json.dumps(summary(rows), indent=1))
    sys.exit(any(row["fingerprint"] != row["undisturbed"] for row in rows))


def read_rows(out: Path) -> list[dict[str, Any]]:
    """The runs finished so far."""
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def killed(rows: list[dict[str, Any]]) -> list[str]:
    """Who was killed, one entry a kill."""
    return [kill["killed"] for row in rows for kill in row["kills"]]


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """All rows in one."""
    count = Counter(killed(rows))
    return {
        "kills": count.total(),
        **{name: count[name] for name in TARGETS},
        "runs": len(rows),
        "runs_at_the_undisturbed_fingerprint": sum(
            row["fingerprint"] == row["undisturbed"] for row in rows
        ),
        "rounds_a_run": ROUNDS,
        "minutes": round(sum(row["seconds"] for row in rows) / 60, 1),
    }


def disturb(folder: Path, out: Path, kills: int, seed: int, seconds: float) -> None:
    """Kill and restart until ``kills`` are done and the run under way has ended."""
    fed = Federation(folder, ["a", "b"], isolation="process")
    wanted = calm_report(fed.names, folder / "calm", **CONFIG)["version"]
    began = time.monotonic()
    try:
        fed.start_all()
        while time.monotonic() - began < seconds:
            rows = read_rows(out)
            left = kills - len(killed(rows))
            if left <= 0:
                break
            rng = random.Random(f"{seed} {len(rows)}")
            started = time.monotonic()
            done: list[dict[str, Any]] = []
            fingerprint = one_run(fed, folder / f"run{len(rows)}", done, left, rng)
            row = {
                "kills": done,
                "fingerprint": fingerprint,
                "undisturbed": wanted,
                "seconds": round(time.monotonic() - started, 1),
            }
            append_row(out, row)
            print(json.dumps(row), flush=True)
    except BaseException:
        for name in ("superlink", "superexec", *fed.names):
            print(f"--- {name}\n{fed.log(name)[-4000:]}", file=sys.stderr)
        raise
    finally:
        fed.kill_9_everything()


def one_run(
    fed: Federation,
    output: Path,
    rows: list[dict[str, Any]],
    kills: int,
    rng: random.Random,
) -> str:
    """One run to its end, disturbed as long as kills are left; returns its fingerprint."""
    fed.submit(output, **CONFIG)
    began = time.monotonic()
    while True:
        if time.monotonic() - began > RUN_SECONDS:
            raise SystemExit(f"{output} does not end after {rows}: {fed.runs()}")
        if len(rows) < kills:
            # None to two rounds on, and then somewhere within a round.
            goal = finished_rounds(output) + rng.randrange(3)
            wait(fed, output, 90, goal)
            if finished_rounds(output) < goal and read_report(output) is None:
                if not fed.any_run_under_way():
                    fed.submit(output, **CONFIG)
                continue
            wait(fed, output, rng.uniform(0, 8))
        if (report := read_report(output)) is not None:
            return str(report["version"])
        if len(rows) < kills:
            target = rng.choice(TARGETS)
            rows.append({"killed": target, "finished_rounds": finished_rounds(output)})
            print(rows[-1], flush=True)
            kill(fed, target)
            died = target != "superlink"
        else:
            wait(fed, output, 60)
            died = read_report(output) is None and not fed.any_run_under_way()
        if died:
            # As dare-agg run --resume does, at once: Flower takes a minute to see the death.
            fed.submit(output, **CONFIG)


def wait(fed: Federation, output: Path, seconds: float, rounds: int = ROUNDS) -> None:
    """Wait so long, or until so many rounds or the run are finished; nodes are kept running."""
    until = time.monotonic() + seconds
    while (
        time.monotonic() < until
        and read_report(output) is None
        and (rounds == ROUNDS or finished_rounds(output) < rounds)
    ):
        fed.revive()
        time.sleep(0.2)


def kill(fed: Federation, target: str) -> None:
    """Kill and start again at once."""
    if target == "serverapp":
        fed.kill_9_server_apps()
    elif target == "superlink":
        fed.kill_9("superlink")
        fed.start_superlink()
    else:
        fed.kill_9_everything()
        fed.start_superlink()
        fed.start_superexec()
        for name in fed.names:
            fed.start_node(name)


if __name__ == "__main__":
    main()

"""kill -9 at random moments in a real federation: does every run end with the same bits?

``python -m simulations.bench_crash`` starts a SuperLink with a database and process isolation,
a SuperExec and two SuperNodes over TLS, runs the small app of ``tests/apps/edge`` again and
again and kills, at random moments, the ServerApp, the SuperLink, or everything. What was killed
is started again; a run that died with it is resumed. Every run must end at the fingerprint of
an undisturbed run. Writes ``results/crash.jsonl``, one row a kill and a summary. (A SuperNode
killed alone costs its update of the round and so changes the result: tests/edge shows that.)
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections import Counter
from pathlib import Path

from simulations.federation import Federation, calm_report, finished_rounds, read_report
from simulations.run import RESULTS

TARGETS = ("serverapp", "superlink", "everything")
ROUNDS = 6
CONFIG = {"num_rounds": ROUNDS, "size": 20_000, "pause": 0.5, "deadline": 600.0}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m simulations.bench_crash", description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=120, help="Stop after so long.")
    parser.add_argument("--out", type=Path, default=RESULTS / "crash.jsonl")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dare-crash-") as folder:
        rows = disturb(Path(folder), options.kills, options.seed, 60 * options.minutes)
    options.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(json.dumps(rows[-1], indent=1))


def disturb(folder: Path, kills: int, seed: int, seconds: float) -> list[dict[str, object]]:
    """Kill and restart until ``kills`` are done and the run under way has ended."""
    rng = random.Random(seed)
    fed = Federation(folder, ["a", "b"], isolation="process")
    wanted = calm_report(fed.names, folder / "calm", **CONFIG)["version"]
    began = time.monotonic()
    rows: list[dict[str, object]] = []
    ends: list[str] = []
    try:
        fed.start_all()
        while len(rows) < kills and time.monotonic() - began < seconds:
            ends.append(one_run(fed, folder / f"run{len(ends)}", rows, kills, rng))
            print(f"run {len(ends)}: {ends[-1][:12]}, wanted {wanted[:12]}, {len(rows)} kills")
    finally:
        fed.kill_9_everything()
    killed = Counter(str(row["killed"]) for row in rows)
    summary = {
        "kills": len(rows),
        **{name: killed[name] for name in TARGETS},
        "runs": len(ends),
        "runs_at_the_undisturbed_fingerprint": ends.count(wanted),
        "fingerprint": wanted,
        "rounds_a_run": ROUNDS,
        "minutes": round((time.monotonic() - began) / 60, 1),
    }
    return [*rows, summary]


def one_run(
    fed: Federation,
    output: Path,
    rows: list[dict[str, object]],
    kills: int,
    rng: random.Random,
) -> str:
    """One run to its end, disturbed as long as kills are left; returns its fingerprint."""
    fed.submit(output, **CONFIG)
    submitted = time.monotonic()
    while True:
        if len(rows) < kills:
            # None to two rounds on, and then somewhere within a round.
            goal = finished_rounds(output) + rng.randrange(3)
            wait(output, 90, goal)
            if finished_rounds(output) < goal and read_report(output) is None:
                if not fed.any_run_under_way():
                    fed.submit(output, **CONFIG)
                continue
            wait(output, rng.uniform(0, 8))
        elif time.monotonic() - submitted > 900:
            raise SystemExit(f"{output} does not end; see {fed.folder}")
        if (report := read_report(output)) is not None:
            return str(report["version"])
        if len(rows) < kills:
            target = rng.choice(TARGETS)
            rows.append({"killed": target, "finished_rounds": finished_rounds(output)})
            print(rows[-1], flush=True)
            kill(fed, target)
            died = target != "superlink"
        else:
            wait(output, 60)
            died = read_report(output) is None and not fed.any_run_under_way()
        if died:
            # As dare-agg run --resume does, at once: Flower takes a minute to see the death.
            fed.submit(output, **CONFIG)
            submitted = time.monotonic()


def wait(output: Path, seconds: float, rounds: int = ROUNDS) -> None:
    """Wait so long, or until so many rounds or the run are finished."""
    until = time.monotonic() + seconds
    while (
        time.monotonic() < until
        and read_report(output) is None
        and (rounds == ROUNDS or finished_rounds(output) < rounds)
    ):
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

"""Buffer and rounds in a real federation whose machines and lines differ tenfold in speed.

``sudo python -m simulations.bench.asynchronous`` starts a SuperLink and ten SuperNodes over TLS,
each in a network namespace behind a line of its own (`SlowLink`, 3 Mbit/s and 20 ms each way);
three of them have a tenth of that and take ten times as long for a training, 100 seconds. They
learn a small classifier of clothes with the rows, steps and drop rate of
``scenarios/asynchronous.toml``: in rounds that wait for all, and with a buffer. ``seconds`` of a
row are those to the accuracy that FedAvg has after as many rounds, minus a point; that accuracy is
found by `simulations.runs.asynchronous`, since no clock is in it. Appends a row a run to
``results/asynchronous_federation.jsonl``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dare_agg.cli.signals import install
from simulations.bench.federation import Federation
from simulations.bench.slow_link import SlowLink, why_not
from simulations.runs import asynchronous
from simulations.runs.rows import RESULTS, append_row, read_rows, versions
from simulations.runs.scenario import KINDS, Row
from simulations.runs.small_classifier import base_and_clients

APP = Path(__file__).parent / "app"
CLIENTS, SLOW, TIMES = 10, 3, 10
# As in the scenario's "intervals and momentum"; the app's default is its rule of staleness.
STEP = "momentum(lr=0.4, beta=0.8)"
# kbit/s of a quick line, both ways, and seconds each way.
LINE, DELAY = 3000, 0.02


@contextlib.contextmanager
def spread_federation(folder: Path) -> Iterator[tuple[Federation, Mapping[str, SlowLink]]]:
    """Ten SuperNodes behind lines of their own, started; all of it is ended and removed."""
    names = [f"{'slow' if n < SLOW else 'quick'}-{n}" for n in range(CLIENTS)]
    (folder / "run").mkdir()
    with contextlib.ExitStack() as stack:
        links = {}
        for number, name in enumerate(names):
            rate = LINE // TIMES if name.startswith("slow") else LINE
            links[name] = stack.enter_context(SlowLink(number, rate, rate, DELAY, loss=0.0))
        federation = Federation(
            folder,
            names,
            host=links[names[0]].gateway,
            prefix=lambda name: links[name].prefix,
            supernode=(sys.executable, "-m", "dare_agg.flower.supernode"),
            app=APP,
            environment={"XDG_RUNTIME_DIR": str(folder / "run")},
        )
        stack.callback(federation.kill_9_everything)
        federation.start_all()
        yield federation, links


def write_rows(folder: Path, seed: int) -> Path:
    """What each client learns from and the base, as files; the folder they are in."""
    own = folder / f"rows-{seed}"
    own.mkdir()
    words = KINDS["asynchronous"][1]
    base, dealt = base_and_clients(seed, CLIENTS, words["alpha"], words["hidden"])
    for place, rows in enumerate(dealt):
        np.savez(own / f"{place}.npz", inputs=rows.inputs, labels=rows.labels)
    np.savez(own / "base.npz", **base)
    return own


def target_of(seed: int, rounds: int) -> float:
    """FedAvg's accuracy after so many rounds, the mean of the last three, minus a point."""
    settings = {
        **KINDS["asynchronous"][1],
        "drop_rate": "0", "values": "f32", "downlink": "full", "rounds": rounds,
    }  # fmt: skip
    curve = asynchronous.run_row(Row("", "asynchronous", "", seed, settings))["curve"]
    last = [point["accuracy"] for point in curve[-3:]]
    return math.fsum(last) / len(last) - 0.01


def curve_of(output: Path) -> list[dict[str, Any]]:
    """Accuracy by seconds since the run began, and what each merge took in."""
    began, *points = read_rows(output / "curve.jsonl")
    kept = ("accepted", "rejected", "accuracy", "upload_bytes")
    return [
        {"seconds": round(point["time"] - began["time"], 1), **{key: point[key] for key in kept}}
        for point in points
    ]


def seconds_to(curve: list[dict[str, Any]], target: float) -> float | None:
    """When the mean of the measurements of the last 30 updates first reached the target.

    Those are of three rounds, or of as many updates in a buffer's merges.
    """
    for end in range(1, len(curve) + 1):
        start, updates = end, 0
        while start and updates < 3 * CLIENTS:
            start -= 1
            updates += curve[start]["accepted"]
        if updates < 3 * CLIENTS:
            continue
        scores = [point["accuracy"] for point in curve[start:end]]
        if math.fsum(scores) / len(scores) >= target:
            return float(curve[end - 1]["seconds"])
    return None


def measure(
    federation: Federation, links: Mapping[str, SlowLink], output: Path, **settings: Any
) -> dict[str, Any]:
    """One run to its end; raises SystemExit where it fails."""
    before = {name: dict(link.carried) for name, link in links.items()}
    status = federation.run(output, **settings)
    if not status.ok:
        raise SystemExit(f"{status}\n{federation.log('superlink')[-3000:]}")
    curve = curve_of(output)
    carried = {
        way: sum(link.carried[way] - before[name][way] for name, link in links.items())
        for way in ("up", "down")
    }
    return {
        "accuracy": curve[-1]["accuracy"],
        "updates": sum(point["accepted"] for point in curve),
        "update_bytes": sorted({size for point in curve for size in point.pop("upload_bytes")}),
        "bytes_up_on_the_lines": carried["up"],
        "bytes_down_on_the_lines": carried["down"],
        "load": round(os.getloadavg()[0], 1),
        "curve": curve,
    }


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m simulations.bench.asynchronous",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--merges", type=int, default=40)
    parser.add_argument("--training-seconds", type=float, default=10.0, help="of a quick machine")
    parser.add_argument("--buffers", type=int, nargs="+", default=[0, 5], help="0: rounds")
    parser.add_argument("--out", type=Path, default=RESULTS / "asynchronous_federation.jsonl")
    options = parser.parse_args()
    if reason := why_not():
        raise SystemExit(reason)
    install()  # a SIGTERM ends nodes and namespaces too
    with tempfile.TemporaryDirectory(prefix="dare-async-") as name:
        folder = Path(name)
        with spread_federation(folder) as (federation, links):
            for seed in options.seeds:
                target, rows = target_of(seed, options.rounds), write_rows(folder, seed)
                for buffer in options.buffers:
                    found = measure(
                        federation, links, folder / f"out-{seed}-{buffer}",
                        seed=seed, rows=str(rows), buffer=buffer,
                        num_rounds=options.merges if buffer else options.rounds,
                        server_step=STEP if buffer else "plain",
                        training_seconds=options.training_seconds,
                    )  # fmt: skip
                    seconds = seconds_to(found["curve"], target)
                    row = {
                        "seed": seed, "buffer": buffer, "target": round(target, 4),
                        "seconds": seconds, **found, "versions": versions(),
                    }  # fmt: skip
                    append_row(options.out, row)
                    told = {key: value for key, value in row.items() if key != "curve"}
                    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()

"""Rounds over a slow link: DARE with the version downlink beside Flower's FedAvg.

``sudo python -m simulations.bench.link`` puts one SuperNode behind a `SlowLink` and runs the app
of ``tests/apps/edge`` with 1.5 million parameters: DARE where the client is sent the base, DARE
where it makes the public base itself, and FedAvg with Flower's own transport. Writes
``results/link.jsonl``. A FedAvg upload of 6 MB takes 160 s at 300 kbit/s at best.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from simulations.bench.federation import Federation, read_report
from simulations.bench.slow_link import SlowLink, why_not
from simulations.runs.rows import RESULTS

RUNS: dict[str, dict[str, Any]] = {
    "DARE p=.99, public base": {"drop_rate": "0.99", "public_base": True},
    "DARE p=.99, base sent": {"drop_rate": "0.99"},
    "FedAvg": {"method": "fedavg"},
}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m simulations.bench.link", description=__doc__)
    parser.add_argument("--parameters", type=int, default=1_500_000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--deadline", type=float, default=900.0, help="of a round, seconds")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--out", type=Path, default=RESULTS / "link.jsonl")
    options = parser.parse_args()
    if reason := why_not():
        raise SystemExit(reason)
    lines = []
    for number, (name, config) in enumerate(RUNS.items()):
        if options.only not in name:
            continue
        settings = {
            "size": options.parameters,
            "num_rounds": options.rounds,
            "deadline": options.deadline,
            **config,
        }
        row = {"name": name, "parameters": options.parameters, **measure(number, settings)}
        print(json.dumps(row), flush=True)
        lines.append(json.dumps(row) + "\n")
    options.out.write_text("".join(lines))


def measure(number: int, settings: dict[str, Any]) -> dict[str, Any]:
    """One run over a fresh line."""
    with tempfile.TemporaryDirectory(prefix="dare-link-") as name, SlowLink(number) as link:
        folder = Path(name)
        fed = Federation(folder, ["far"], host=link.gateway, prefix=lambda node: link.prefix)
        try:
            fed.start_all()
            before = dict(link.carried)
            status = fed.run(folder / "out", **settings)
            carried = {way: link.carried[way] - before[way] for way in before}
        finally:
            fed.stop_all()
        report = read_report(folder / "out") or {}
    rounds = report.get("rounds", [])
    return {
        "status": status.status,
        "rounds_with_its_update": report.get("trained", sum(r["accepted"] for r in rounds)),
        "seconds": round(report.get("seconds", float("nan")), 1),
        "seconds_a_round": [round(r["seconds"], 1) for r in rounds],
        "bytes_up_on_the_line": carried["up"],
        "bytes_down_on_the_line": carried["down"],
        "link": f"{link.up_kbit_s}/{link.down_kbit_s} kbit/s, {2000 * link.delay:.0f} ms, "
        f"{100 * link.loss:g} % loss",
    }


if __name__ == "__main__":
    main()

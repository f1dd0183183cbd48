"""Memory, bytes and CPU time of rounds on models of up to billions of parameters.

    python -m simulations.bench.llm --json                          # every point, hours
    python -m simulations.bench.llm --points gpt2-large --json
    python -m simulations.bench.llm --points tiny --out /tmp/rows.jsonl

A point runs in two processes of its own: the server (`DareStrategy` over a base on disk) and the
clients (`dare_agg.torch`), one after another in one process. Base and trained parameters lie in
mapped files, and training adds a made-up change to the parameters in place, so that neither
process holds a model: peaks are of own memory (``RssAnon``, every 20 ms), mapped files apart.
Of Llama 3 8B's shapes both sides at once would need 87 GB of disk: there the server's clients are
made up (a delta that exists tile by tile only), its files are removed, and then a real client
answers the messages that the first of them got.
``client_extra_mib`` is what the clients' process took beyond what it had once torch was loaded
and the model made. CPU seconds are those of the costliest round and of the costliest answer
without its training; ``download_bytes`` are the most that a client was sent after the first
round, ``disk_bytes`` the most that the server's state folder took of the disk, for each parameter.
Rows are kept in ``--out`` and a point that is there is not run again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from simulations.runs.checkpoints import gpt2_shapes, llama_3_8b_shapes, make_checkpoints
from simulations.runs.memory import Peak, PeakRoom
from simulations.runs.rows import RESULTS, append_row, read_rows, versions

_TILE = 1 << 20


def _rows(count: int, size: int = 1_000_000) -> dict[str, tuple[int, ...]]:
    return {f"layer{number}.weight": (size // 1000, 1000) for number in range(count)}


@dataclass(frozen=True)
class Point:
    """A model, a federation and how many rounds of it."""

    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)
    dtype: str = "float32"
    clients: int = 4
    rounds: int = 2
    drop_rate: str = "0.99"
    # The disk of one machine does not hold the server's files and the clients': clients are made
    # up, then the server's files go, and a real one answers what the first was asked.
    apart: bool = False

    @property
    def parameters(self) -> int:
        return sum(int(np.prod(shape)) for shape in self.shapes.values())


POINTS = {
    "tiny": Point(_rows(2, 100_000), rounds=3),
    "tiny-apart": Point(_rows(2, 100_000), "bfloat16", rounds=3, apart=True),
    "gpt2": Point(gpt2_shapes(12, 768), rounds=3),
    "gpt2-large": Point(gpt2_shapes(36, 1280), clients=6),
    "llama-3-8b": Point(llama_3_8b_shapes(), "bfloat16", apart=True),
    "22m-64-clients": Point(_rows(22), clients=64),
    **{f"{n}-clients": Point(_rows(4), clients=n) for n in (4, 16, 64)},
    **{f"{n}-rounds": Point(_rows(4), rounds=n) for n in (10, 50)},
}


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Run a point's server in this process, its clients in another; returns the row."""
    from dare_agg.flower import DareStrategy
    from dare_agg.flower.round_outcome import RoundOutcome
    from simulations.runs.far_grid import FarGrid, answer_kept
    from simulations.runs.memory_grid import pretend_task

    pretend_task()
    point = POINTS[name]
    base = folder / "base"
    rounds: list[dict[str, Any]] = []
    spent = [0.0]

    def cpu_seconds() -> float:
        watching = own.cpu_seconds + grid.peak.cpu_seconds + disk.cpu_seconds
        return time.process_time() - watching

    def after(outcome: RoundOutcome) -> None:
        measured, now = outcome.measurements, cpu_seconds()
        disk.look()
        rounds.append(
            {
                "accepted": measured["accepted"],
                "upload_bytes": max(measured["upload_bytes"]),
                "download_bytes": max(measured["download_bytes"]),
                "cpu_seconds": now - (spent[0] or grid.began or 0.0),
            }
        )
        spent[0] = now

    strategy = DareStrategy(
        min_available_nodes=point.clients,
        min_train_nodes=point.clients,
        fraction_evaluate=0.0,
        drop_rate=point.drop_rate,
        seed=1,
        deadline=36_000.0,
        base=str(base),
        state=str(folder / "state"),
        round_hook=after,
    )
    kept = folder / "asked" if point.apart else None
    began = time.monotonic()
    disk = PeakRoom(folder / "state")
    clients = FarGrid(_clients(name, folder, point.apart), point.clients, kept)
    with Peak() as own, disk, clients as grid:
        strategy.start(grid, num_rounds=point.rounds)
    assert [row["accepted"] for row in rounds] == [point.clients] * point.rounds, rounds
    found = grid.answers, grid.before["own_bytes"], grid.peak
    if kept is not None:
        strategy.store.close()
        shutil.rmtree(folder / "state")
        found = answer_kept(_clients(name, folder), kept)
    answers, before, peak = found
    answers = [answer for answer in answers if answer["trained"]]
    assert len(answers) == point.rounds * (1 if point.apart else point.clients), answers
    return {
        "point": name,
        "parameters": point.parameters,
        "dtype": point.dtype,
        "clients": point.clients,
        "drop_rate": point.drop_rate,
        "server_anonymous_mib": own.own >> 20,
        "client_extra_mib": (peak.own - before) >> 20,
        "upload_bytes": max(row["upload_bytes"] for row in rounds),
        "download_bytes": max(row["download_bytes"] for row in rounds[1:]),
        "server_cpu_seconds": round(max(row["cpu_seconds"] for row in rounds), 2),
        "client_cpu_seconds": round(max(answer["cpu_seconds"] for answer in answers), 2),
        "rounds": point.rounds,
        "client_anonymous_mib": peak.own >> 20,
        "server_mapped_mib": own.mapped >> 20,
        "server_start_cpu_seconds": round(grid.began or 0.0, 2),
        "disk_bytes": round(disk.most / point.parameters, 3),
        "seconds": round(time.monotonic() - began, 1),
    }


def _clients(name: str, folder: Path, made_up: bool = False) -> list[str]:
    way = "--made-up-of" if made_up else "--clients-of"
    words = [sys.executable, "-m", "simulations.bench.llm", way, name]
    return [*words, "--folder", str(folder)]


def serve_made_up() -> None:
    """The clients' side of a point, made up."""
    from flwr.app import Context, Message

    from simulations.runs.far_grid import serve
    from simulations.runs.made_up import made_up_answer

    class Answer:
        trained_seconds = 0.0

        def __call__(self, message: Message, context: Context) -> Message:
            return made_up_answer(message, int(context.node_config["partition-id"]))

    serve(Answer(), lambda number: {"partition-id": number})


def serve_clients(name: str, folder: Path) -> None:
    """The clients' side of a point: `dare_agg.torch` on parameters in a mapped file."""
    import torch
    from flwr.app import Context, Message
    from flwr.clientapp import ClientApp

    from dare_agg.flower import dare_mod
    from dare_agg.torch import federated_model
    from simulations.runs.far_grid import serve

    point = POINTS[name]
    torch.set_num_threads(1)
    model = mapped_model(folder / "trained", point)
    clients = ClientApp(mods=[dare_mod])

    @clients.train()
    def train(msg: Message, context: Context) -> Message:
        with federated_model(model, msg, context) as turn:
            began = time.process_time()
            number = int(msg.content["config"]["server-round"])
            move(model, [number, int(context.node_config["partition-id"])])
            answer.trained_seconds = time.process_time() - began
        return turn.reply(num_examples=10)

    class Answer:
        trained_seconds = 0.0

        def __call__(self, message: Message, context: Context) -> Message:
            return clients(message, context)

    answer = Answer()
    base = str(folder / "base")
    serve(
        answer,
        lambda number: {
            "partition-id": number,
            "cache": str(folder / "cache" / str(number)),
            "base": base,
        },
    )


def mapped_model(file: Path, point: Point) -> Any:
    """A module of a point's parameters that lie in a file, one after another."""
    import torch

    dtype = getattr(torch, point.dtype)
    flat = torch.from_file(str(file), shared=True, size=point.parameters, dtype=dtype)
    root, start = torch.nn.Module(), 0
    for name, shape in point.shapes.items():
        *path, last = name.split(".")
        module = root
        for word in path:
            if word not in dict(module.named_children()):
                module.add_module(word, torch.nn.Module())
            module = module.get_submodule(word)
        size = int(np.prod(shape))
        values = flat[start : start + size].view(shape)
        module.register_parameter(last, torch.nn.Parameter(values))
        start += size
    return root


def move(model: Any, seed: list[int]) -> None:
    """Training: every parameter moves by about 2e-4, tile by tile, in place."""
    import torch

    rng = np.random.default_rng(seed)
    change = torch.from_numpy(rng.standard_normal(_TILE, np.float32) * np.float32(2e-4))
    with torch.no_grad():
        for parameter in model.parameters():
            flat = parameter.view(-1)
            for lo in range(0, flat.numel(), _TILE):
                flat[lo : lo + _TILE] += change[: min(_TILE, flat.numel() - lo)].to(flat.dtype)


def main() -> None:
    """Entry point: each point is run in processes of its own."""
    parser = argparse.ArgumentParser(
        prog="python -m simulations.bench.llm",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--points", nargs="+", choices=POINTS, default=[*POINTS][2:])
    parser.add_argument("--folder", type=Path, help="for the files of a point; emptied afterwards")
    parser.add_argument("--out", type=Path, default=RESULTS / "llm.jsonl")
    parser.add_argument("--json", action="store_true", help="print all rows asked for")
    parser.add_argument("--point", choices=POINTS, help=argparse.SUPPRESS)
    parser.add_argument("--clients-of", choices=POINTS, help=argparse.SUPPRESS)
    parser.add_argument("--made-up-of", choices=POINTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.clients_of:
        serve_clients(options.clients_of, options.folder)
        return
    if options.made_up_of:
        serve_made_up()
        return
    if options.point:
        print(json.dumps(measure(options.point, options.folder)))
        return
    for name in options.points:
        if name not in {row["point"] for row in read_rows(options.out)}:
            row = run(name, options.folder)
            append_row(options.out, {**row, "versions": versions()})
            print(json.dumps(row), file=sys.stderr, flush=True)
    if options.json:
        found = [row for row in read_rows(options.out) if row["point"] in options.points]
        print(json.dumps({"rows": found}))


def run(name: str, within: Path | None) -> dict[str, Any]:
    """Make a point's base, run it, and remove its files."""
    point = POINTS[name]
    with tempfile.TemporaryDirectory(prefix="dare-llm-", dir=within) as made:
        folder = Path(made)
        make_checkpoints(
            folder, 0, point.dtype, dict(point.shapes), repeated=point.parameters > 10**9
        )
        command = [sys.executable, "-m", "simulations.bench.llm", "--point", name]
        done = subprocess.run(
            [*command, "--folder", str(folder)], stdout=subprocess.PIPE, check=False
        )
        if done.returncode:
            raise SystemExit(f"error: {name} ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()

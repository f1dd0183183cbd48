"""What the fuzzers share: the loop that counts answers and watches steps, time and memory.

A `Target` makes one mutant at a time; trying it returns, or raises a `DareError`. Anything else
ends the fuzz. Guided by coverage: a mutant that takes a step between two lines of the library
not taken before, or leads to an answer not seen before (an error of other words), joins the ones
to mutate further. Steps are watched in one mutant of 64, since that slows it several times.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Protocol

from dare_agg.errors import REASONS, DareError
from simulations.runs.rows import RESULTS, append_row, read_rows

ROWS = RESULTS / "fuzz.jsonl"
PIECE = 50_000
WATCHED = 64
HANG_SECONDS = 20
# Of one mutant, CPU time; and what all of a piece may add to the resident size.
MOST_SECONDS = 1.0
MOST_MIB = 64
# In memory where there is such a place: a mutant's file is written and read once.
FAST_FOLDER = next((name for name in ("/dev/shm",) if Path(name).is_dir()), None)
_NUMBERS = re.compile(r"'[^']*'|b'[^']*'|[0-9a-f]{8,}|\d+")
_NUMBER_AT_LEAST = (0, 1, 2, 3, 7, 255, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)


@dataclass(frozen=True)
class Attempt:
    """One mutant: ``work`` tries it, ``keep`` has it mutated further."""

    work: Callable[[], object]
    keep: Callable[[], None]


class Target(Protocol):
    """What is fuzzed; ``name`` says so in the rows, ``rooms`` are the folders watched."""

    name: str
    rooms: tuple[str, ...]

    def attempt(self, rng: random.Random) -> Attempt:
        """Make a mutant."""


def damaged(rng: random.Random, blob: bytes, other: Callable[[], bytes]) -> bytes:
    """Damage bytes once or more: flips, numbers, cuts, copies, swaps, splices with ``other()``."""
    data = bytearray(blob)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at, kind = rng.randrange(len(data) + 1), rng.randrange(8)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at : at + 4] = rng.choice(_NUMBER_AT_LEAST).to_bytes(4, "little")
        elif kind == 2:
            data[at : at + 8] = rng.choice((0, 1, 1 << 40, 1 << 63, (1 << 64) - 1)).to_bytes(
                8, "little"
            )
        elif kind == 3:
            del data[at : at + rng.choice((1, 4, 32, 64, len(data)))]
        elif kind == 4:
            data[at:at] = data[at : at + rng.randrange(1, 128)] or b"\0"
        elif kind == 5:
            data[at : at + rng.randrange(1, 64)] = rng.randbytes(rng.randrange(64))
        elif kind == 6:
            far, size = rng.randrange(len(data) + 1), rng.randrange(1, 64)
            data[at : at + size], data[far : far + size] = (
                data[far : far + size],
                data[at : at + size],
            )
        else:
            graft = other()
            data[at:] = graft[at if rng.random() < 0.5 else rng.randrange(len(graft) + 1) :]
    return bytes(data)


def outcome(work: Callable[[], object]) -> tuple[str, str]:
    """Return (reason, wording without its numbers); anything but a `DareError` escapes."""
    try:
        work()
    except DareError as error:
        assert error.reason in REASONS, f"reason {error.reason!r} is not in the table"
        assert "\n" not in str(error) and len(str(error)) < 1000, f"no short line: {error}"
        return error.reason, _NUMBERS.sub("#", str(error))
    return "accepted", ""


class Steps:
    """Which steps from line to line of the files in ``rooms`` were taken so far."""

    def __init__(self, rooms: Sequence[str]) -> None:
        self._rooms = tuple(rooms)
        self._taken: set[tuple[int, int, int]] = set()
        self._numbers: dict[CodeType, int | None] = {}

    def __len__(self) -> int:
        return len(self._taken)

    def watched(self, work: Callable[[], Any]) -> Any:
        """Return ``work()``, noting its steps."""
        sys.settrace(self._enter)
        try:
            return work()
        finally:
            sys.settrace(None)

    def _enter(self, frame: FrameType, _: str, __: Any) -> Callable[..., Any] | None:
        code = frame.f_code
        if code not in self._numbers:
            ours = code.co_filename.startswith(self._rooms)
            self._numbers[code] = len(self._numbers) if ours else None
        number = self._numbers[code]
        if number is None:
            return None
        last = 0

        def step(frame: FrameType, event: str, _: Any) -> Callable[..., Any]:
            nonlocal last
            if event == "line":
                line = frame.f_lineno
                self._taken.add((number, last, line))
                last = line
            return step

        return step


def fuzz(
    target: Target, count: int, seed: int = 0, seconds: float = float("inf")
) -> dict[str, Any]:
    """Run ``count`` mutants, or for so many seconds; returns the figures.

    Raises whatever is not a typed error, and `AssertionError` where a mutant takes more than
    `MOST_SECONDS` of CPU or all of them add more than `MOST_MIB` to the resident size.
    """
    rng = random.Random(seed)
    found: Counter[str] = Counter()
    seen: set[tuple[str, str]] = set()
    steps = Steps(target.rooms)
    slowest, started = 0.0, time.perf_counter()

    def stuck(_: int, __: FrameType | None) -> None:
        raise TimeoutError(f"64 mutants took longer than {HANG_SECONDS} CPU s")

    signal.signal(signal.SIGPROF, stuck)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kept, used = 0, time.process_time()
    for number in range(count):
        known = len(steps)
        if number % 64 == 0:
            # Of CPU time: a machine that is busy or asleep is no hang.
            signal.setitimer(signal.ITIMER_PROF, HANG_SECONDS)
            if time.perf_counter() - started > seconds:
                break
        attempt = target.attempt(rng)
        watched = number % WATCHED == 0
        begin = time.process_time()
        if watched:
            answer = steps.watched(lambda work=attempt.work: outcome(work))
        else:
            answer = outcome(attempt.work)
            slowest = max(slowest, time.process_time() - begin)
            assert slowest < MOST_SECONDS, f"a mutant took {slowest:.1f} s: {answer}"
        found[answer[0]] += 1
        if answer not in seen or len(steps) > known:
            attempt.keep()
            kept += 1
        seen.add(answer)
    signal.setitimer(signal.ITIMER_PROF, 0)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < MOST_MIB, f"memory grew by {grown:.0f} MiB"
    return {
        "mutants": sum(found.values()),
        "answers": len(seen),
        "steps": len(steps),
        "corpus": kept,
        "reasons": dict(found.most_common()),
        "slowest_ms": round(1e3 * slowest, 1),
        "memory_growth_mib": round(grown, 1),
        "cpu": round(time.process_time() - used, 1),
        "seconds": round(time.perf_counter() - started, 1),
    }


def pieces(
    make: Callable[[], Target], count: int, *, seed: int, seconds: float, out: Path | None
) -> list[dict[str, Any]]:
    """Fuzz a target piece by piece, each of the next seed; those in ``out`` are not run again."""
    rows: list[dict[str, Any]] = []
    name = make().name
    for number, start in enumerate(range(0, count, PIECE), seed):
        # Several processes may share the file, from different seeds on.
        stored = read_rows(out) if out else []
        done = [r for r in stored if r.get("target") == name and r["seed"] == number]
        if not done:
            figures = fuzz(make(), min(PIECE, count - start), number, seconds)
            done = [{"target": name, "seed": number, **figures}]
            if out:
                append_row(out, done[0])
        rows += done
    return rows


def joined(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of several pieces as one: sums, or the largest."""
    reasons: Counter[str] = Counter()
    for row in rows:
        reasons.update(row["reasons"])
    most = ("answers", "steps", "corpus", "slowest_ms", "memory_growth_mib")
    return {
        "mutants": sum(row["mutants"] for row in rows),
        "reasons": dict(reasons.most_common()),
        **{name: max(row[name] for row in rows) for name in most},
    }


def add_words(parser: argparse.ArgumentParser) -> None:
    """The words of every fuzzer's command line."""
    parser.add_argument(
        "--seed", type=int, default=0, help="of the first piece; the next is one up"
    )
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop a piece after")
    parser.add_argument("--out", type=Path, help="append each piece to this file, skip those there")


def show(rows: list[dict[str, Any]]) -> None:
    """Print one line a target."""
    for name in dict.fromkeys(row["target"] for row in rows):
        own = [row for row in rows if row["target"] == name]
        print(json.dumps({"target": name, **joined(own)}), flush=True)

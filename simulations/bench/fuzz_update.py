"""Throw damaged updates at the decoder: only typed errors, no memory, no hang.

    python -m simulations.bench.fuzz_update --count 1000000

Starts from good updates of every value format and mask, in-round and as files. Guided by
coverage: a mutant that takes a step between two lines of the decoder not taken before, or
leads to an answer not seen before (an error of other words), joins the ones to mutate further
(steps are watched in one mutant of eight: it triples the time).
Half of the mutants get a checksum, and files a context, that fit again, so that the checks
behind them are reached. What is accepted is read to its end.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import resource
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import numpy as np

from dare_agg import codec, vectors
from dare_agg.codec.formats import VALUE_FORMATS
from dare_agg.codec.mask import MASK_KINDS, parse_drop_rate
from dare_agg.codec.update import (
    CHECKSUM_BYTES,
    HEADER_BYTES,
    Update,
    UpdateSpec,
    _checksum,
    _header,
    decode_update,
    encode_update,
)
from dare_agg.codec.update_file import (
    FILE_MAGIC,
    _checked_spec,
    _parse,
    read_update_file,
    write_update_file,
)
from dare_agg.errors import REASONS, DareError
from dare_agg.vectors.layout import Layout, layout_of
from simulations.runs.rows import append_row, read_rows

FILE_SHARE = 0.2
MAX_CORPUS = 4000
WATCHED = 8
PIECE = 50_000
MAX_ACCEPTED_SIZE = 1 << 22
HANG_SECONDS = 20
MEMORY_LIMIT_MIB = 256
_DECODER = tuple(str(Path(room.__file__).parent) for room in (codec, vectors))
# In memory where there is such a place: a mutant's file is written and read once.
_FAST_FOLDER = next((name for name in ("/dev/shm",) if Path(name).is_dir()), None)
_NUMBERS = (0, 1, 2, 7, 255, 256, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1,
            2**63, 2**64 - 1)  # fmt: skip
_ODD: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 1.5, 2**20, 2**40, 2**64, 10**30, "", "b1", "f32", "bernoulli",
    "../x", "a\nb", "\ud800", [], {}, [1, 2], [[]], "0" * 32, "f" * 64, ["a", "F32", [3]],
)  # fmt: skip


def seeds(folder: Path) -> tuple[list[tuple[UpdateSpec, bytes]], list[bytes]]:
    """Good updates with their specs, and good files."""
    layout = layout_of({"a.weight": (61, 41), "b": (77,), "c": ()})
    delta = np.random.default_rng(0).standard_normal(layout.size).astype(np.float32)
    in_round, files = [], []
    for values in VALUE_FORMATS:
        for mask in MASK_KINDS:
            for rate in ("0", "0.5", "0.9"):
                spec = spec_of(layout, values, mask, rate)
                in_round.append((spec, encode_update(spec, delta)))
                path = folder / "seed.dare"
                write_update_file(path, spec, layout, delta, seed=1, overwrite=True)
                files.append(path.read_bytes())
    return in_round, files


def spec_of(layout: Layout, values: str, mask: str, rate: str) -> UpdateSpec:
    return UpdateSpec(
        layout.size, parse_drop_rate(rate), mask, b"m" * 16, b"v" * 16, 1, values, "ab" * 32,
        layout.fingerprint, True, b"a round",
    )  # fmt: skip


def mutate(rng: random.Random, blob: bytes, others: Callable[[], bytes]) -> bytes:
    """Damage bytes: flips, numbers, cuts, copies, splices."""
    data = bytearray(blob)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(data) + 1)
        if rng.random() < 0.6:
            at = min(at, rng.randrange(HEADER_BYTES + 1))
        kind = rng.randrange(7)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at : at + 4] = struct.pack("<I", rng.choice(_NUMBERS) & 0xFFFFFFFF)
        elif kind == 2:
            data[at : at + 8] = struct.pack("<Q", rng.choice(_NUMBERS))
        elif kind == 3:
            data[at : at + rng.randrange(1, 64)] = b""
        elif kind == 4:
            data[at:at] = data[at : at + rng.randrange(1, 64)] or b"\0"
        elif kind == 5:
            other = others()
            data[at:] = other[rng.randrange(len(other) + 1) :]
        else:
            odd = rng.choice((np.nan, np.inf, -np.inf, -1.0, 2.0**61, 1e-45, -0.0))
            end = max(0, len(data) - rng.randrange(64))
            data[end : end + 4] = struct.pack("<f", odd)
    return bytes(data)


def sealed(spec: UpdateSpec, blob: bytes) -> bytes:
    """The blob with a checksum that fits."""
    if len(blob) < HEADER_BYTES:
        return blob
    data = bytearray(blob)
    data[HEADER_BYTES - CHECKSUM_BYTES : HEADER_BYTES] = _checksum(spec, memoryview(data))
    return bytes(data)


def mutate_file(rng: random.Random, blob: bytes, others: Callable[[], bytes]) -> bytes:
    """Damage a file as bytes, or its JSON as a tree."""
    try:
        (length,) = struct.unpack("<I", blob[12:16])
        record = json.loads(blob[16 : 16 + length])
        assert isinstance(record, dict) and record
    except Exception:
        return mutate(rng, blob, others)
    if rng.random() < 0.4:
        return mutate(rng, blob, others)
    body = blob[-(-(16 + length) // 8) * 8 :]
    for _ in range(rng.choice((1, 1, 2))):
        _mutate_tree(rng, record)
    text = json.dumps(record, sort_keys=rng.random() < 0.9, separators=(",", ":")).encode()
    if rng.random() < 0.05:
        text = rng.choice((b"[" * 5000, b"{}", b"", b"[1e999]", text[:-1], text + b" "))
    head = FILE_MAGIC + struct.pack("<II", 1, len(text)) + text
    return head + b" " * (-len(head) % 8) + body


def refitted(rng: random.Random, blob: bytes) -> bytes:
    """A file whose in-round header, context and checksum fit its JSON, where that is good."""
    (length,) = struct.unpack("<I", blob[12:16].ljust(4, b"\0"))
    start = -(-(16 + length) // 8) * 8
    try:
        spec = _checked_spec(_parse(blob[16 : 16 + length]))
    except DareError:
        return blob
    payload = blob[start + HEADER_BYTES :]
    stratified = spec.mask == "stratified"
    survivors = spec.draw_mask().survivors if stratified else rng.choice((0, 1, 245, 1229, 2579))
    return blob[:start] + sealed(spec, _header(spec, survivors, len(payload)) + payload)


def _mutate_tree(rng: random.Random, node: Any) -> None:
    keys: Any = list(node) if isinstance(node, dict) else range(len(node))
    if not keys:
        return
    key = rng.choice(list(keys))
    child = node[key]
    if isinstance(child, list | dict) and child and rng.random() < 0.7:
        _mutate_tree(rng, child)
    elif isinstance(child, int) and not isinstance(child, bool) and rng.random() < 0.5:
        node[key] = rng.choice((child + 1, child - 1, child * 2, rng.choice(_NUMBERS)))
    elif rng.random() < 0.1 and isinstance(node, dict):
        del node[key]
    else:
        node[key] = deepcopy(rng.choice(_ODD))


def use(update: Update) -> None:
    """Read all of what was accepted, if it is of a size that the seeds' files can mean."""
    if update.spec.size > MAX_ACCEPTED_SIZE:
        return
    out = np.empty(update.spec.size, np.float32)
    update.read(0, out.size, out)
    assert np.isfinite(out).all(), "an accepted update has values that are not finite"


def _read_file(path: Path) -> Update:
    return read_update_file(path)[0]


def outcome(work: Callable[[], Update]) -> tuple[str, str]:
    """Return (reason, wording without its numbers); anything but a `DareError` escapes."""
    try:
        use(work())
    except DareError as error:
        assert error.reason in REASONS, f"reason {error.reason!r} is not in the table"
        assert "\n" not in str(error) and len(str(error)) < 1000
        words = re.sub(r"'[^']*'|b'[^']*'|[0-9a-f]{8,}|\d+", "#", str(error))
        return error.reason, words.rpartition(".dare: ")[2]
    return "accepted", ""


class Steps:
    """Which steps from line to line of the decoder's files were taken so far."""

    def __init__(self) -> None:
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
            ours = code.co_filename.startswith(_DECODER)
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


def fuzz(count: int, seed: int = 0, seconds: float = float("inf")) -> dict[str, Any]:
    """Run ``count`` mutants, or for so many seconds; returns the figures.

    Raises whatever is not a typed error.
    """
    rng = random.Random(seed)
    found: Counter[str] = Counter()
    seen: set[tuple[str, str]] = set()
    steps = Steps()
    slowest, started = 0.0, time.perf_counter()

    def stuck(_: int, __: FrameType | None) -> None:
        raise TimeoutError(f"64 mutants took longer than {HANG_SECONDS} CPU s")

    signal.signal(signal.SIGPROF, stuck)
    with tempfile.TemporaryDirectory(dir=_FAST_FOLDER) as name:
        folder = Path(name)
        in_round, files = seeds(folder)
        specs = [spec for spec, _ in in_round]
        path = folder / "mutant.dare"
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number in range(count):
            known = len(steps)
            if number % 64 == 0:
                # Of CPU time: a machine that is busy or asleep is no hang.
                signal.setitimer(signal.ITIMER_PROF, HANG_SECONDS)
                if time.perf_counter() - started > seconds:
                    break
            as_file = rng.random() < FILE_SHARE
            if as_file:
                blob = mutate_file(rng, rng.choice(files), lambda: rng.choice(files))
                if rng.random() < 0.5:
                    blob = refitted(rng, blob)
                path.write_bytes(blob)
                work = partial(_read_file, path)
            else:
                spec, blob = rng.choice(in_round)
                blob = mutate(rng, blob, lambda: rng.choice(in_round)[1])
                if rng.random() < 0.5:
                    blob = sealed(spec, blob)
                if rng.random() < 0.05:
                    spec = rng.choice(specs)
                work = partial(decode_update, blob, spec)
            begin = time.process_time()
            answer = outcome(work) if number % WATCHED else steps.watched(partial(outcome, work))
            slowest = max(slowest, time.process_time() - begin)
            found[answer[0]] += 1
            fresh = answer not in seen or len(steps) > known
            seen.add(answer)
            if fresh and len(in_round) + len(files) < MAX_CORPUS:
                if as_file:
                    files.append(blob)
                else:
                    in_round.append((spec, blob))
        signal.setitimer(signal.ITIMER_PROF, 0)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < MEMORY_LIMIT_MIB, f"memory grew by {grown:.0f} MiB"
    return {
        "mutants": sum(found.values()),
        "answers": len(seen),
        "steps": len(steps),
        "corpus": len(in_round) + len(files),
        "reasons": dict(found.most_common()),
        "slowest_ms": round(1e3 * slowest, 1),
        "memory_growth_mib": round(grown, 1),
        "seconds": round(time.perf_counter() - started, 1),
    }


def joined(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of several pieces as one: sums, or the largest."""
    reasons: Counter[str] = Counter()
    for row in rows:
        reasons.update(row["reasons"])
    return {
        "mutants": sum(row["mutants"] for row in rows),
        "reasons": dict(reasons.most_common()),
        **{
            name: max(row[name] for row in rows)
            for name in ("answers", "steps", "corpus", "slowest_ms", "memory_growth_mib")
        },
        "seconds": round(sum(row["seconds"] for row in rows), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m simulations.bench.fuzz_update", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument(
        "--seed", type=int, default=0, help="of the first piece; the next is one up"
    )
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop a piece after")
    parser.add_argument("--out", type=Path, help="append each piece to this file, skip those there")
    words = parser.parse_args()
    rows = read_rows(words.out) if words.out else []
    for number, start in enumerate(range(0, words.count, PIECE), words.seed):
        # Several processes may share the file, from different seeds on.
        rows = read_rows(words.out) if words.out else rows
        if number in {row["seed"] for row in rows}:
            continue
        row = {"seed": number, **fuzz(min(PIECE, words.count - start), number, words.seconds)}
        rows.append(row)
        if words.out:
            append_row(words.out, row)
    print(json.dumps(joined(rows)))


if __name__ == "__main__":
    main()

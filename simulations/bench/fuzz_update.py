"""Throw damaged updates at the decoder: only typed errors, no memory, no hang.

    python -m simulations.bench.fuzz_update --count 1000000

Starts from good updates of every value format and mask, in-round and as files; the loop is
that of `simulations.bench.fuzzing`. Half of the mutants get a checksum, and files a context, that
fit again, so that the checks behind them are reached. What is accepted is read to its end.
"""

from __future__ import annotations

import argparse
import json
import random
import struct
import tempfile
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dare_agg import codec, vectors
from dare_agg.codec.directions import _checksum as section_checksum
from dare_agg.codec.file_header import FILE_MAGIC, FileHeader, checked_spec, parse_header
from dare_agg.codec.fitted_rates import fitted_rates, levels_of, tensor_squares
from dare_agg.codec.formats import VALUE_FORMATS
from dare_agg.codec.mask import MASK_KINDS, parse_drop_rate
from dare_agg.codec.rates import TensorRates
from dare_agg.codec.update import Update, UpdateSpec, decode_update, encode_update
from dare_agg.codec.update_file import read_update_file, write_update_file
from dare_agg.codec.update_header import CHECKSUM_BYTES, HEADER_BYTES, checksum_of, pack_header
from dare_agg.errors import DareError
from dare_agg.vectors.layout import Layout, layout_of
from simulations.bench.fuzzing import FAST_FOLDER, Attempt, add_words, pieces, show

FILE_SHARE = 0.2
OWN_RATES, TOLD_RATES = "own rates", "told rates"
MAX_ACCEPTED_SIZE = 1 << 22
_DECODER = tuple(str(Path(room.__file__).parent) for room in (codec, vectors))
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
    levels = levels_of(layout.sizes, tensor_squares(layout.sizes, delta) * (1.0, 1e-4, 0.01))
    for values in VALUE_FORMATS:
        for mask in (*MASK_KINDS, OWN_RATES, TOLD_RATES):
            for rate in ("0", "0.5", "0.9"):
                spec = spec_of(layout, values, mask, rate, levels)
                expected = spec
                if spec.rates is not None and not spec.rates.told:
                    expected = replace(spec, rates=TensorRates(layout.sizes))
                in_round.append((expected, encode_update(spec, delta)))
                path = folder / "seed.dare"
                write_update_file(path, spec, layout, delta, seed=1, overwrite=True)
                files.append(path.read_bytes())
        rows = np.random.default_rng(1).standard_normal((3, 41))
        for number, rank in enumerate((1, 3)):
            write_update_file(
                path, spec, layout, delta, seed=number, overwrite=True,
                directions={"a.weight": (rows[:rank], 1)}, directions_values=values,
            )  # fmt: skip
            files.append(path.read_bytes())
    return in_round, files


def spec_of(layout: Layout, values: str, mask: str, rate: str, levels: bytes) -> UpdateSpec:
    """``mask`` may be one of keep rates by tensor, that travel or are told beforehand."""
    rates = None
    if mask in (OWN_RATES, TOLD_RATES):
        told = mask == TOLD_RATES
        rates = fitted_rates(layout.sizes, levels, parse_drop_rate(rate), values, told=told)
    kind = mask if mask in MASK_KINDS else "stratified"
    return UpdateSpec(
        layout.size, parse_drop_rate(rate), kind, b"m" * 16, b"v" * 16, 1, values, "ab" * 32,
        layout.fingerprint, True, b"a round", rates=rates,
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
    data[HEADER_BYTES - CHECKSUM_BYTES : HEADER_BYTES] = checksum_of(spec, memoryview(data))
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
        mutate_tree(rng, record)
    text = json.dumps(record, sort_keys=rng.random() < 0.9, separators=(",", ":")).encode()
    if rng.random() < 0.05:
        text = rng.choice((b"[" * 5000, b"{}", b"", b"[1e999]", text[:-1], text + b" "))
    version = rng.choice((1, 2, 3)) if rng.random() < 0.1 else blob[8] & 3
    head = FILE_MAGIC + struct.pack("<II", version, len(text)) + text
    return head + b" " * (-len(head) % 8) + body


def refitted(rng: random.Random, blob: bytes) -> bytes:
    """A file whose in-round header, context and checksum fit its JSON, where that is good."""
    (length,) = struct.unpack("<I", blob[12:16].ljust(4, b"\0"))
    start = -(-(16 + length) // 8) * 8
    try:
        header = parse_header(blob[16 : 16 + length], blob[8])
        spec = checked_spec(header)
        payload, section = blob[start + HEADER_BYTES :], b""
        if header.directions is not None:
            behind = header.directions.nbytes(header.layout)
            payload, section = payload[:-behind], payload[-behind:-CHECKSUM_BYTES]
            section += section_checksum(spec.values_key, spec.context, section)
        if spec.rates is not None:
            spec = replace(spec, rates=spec.rates.read(memoryview(payload)))
    except DareError:
        return blob
    stratified = spec.mask == "stratified"
    survivors = spec.draw_mask().survivors if stratified else rng.choice((0, 1, 245, 1229, 2579))
    return (
        blob[:start] + sealed(spec, pack_header(spec, survivors, len(payload)) + payload) + section
    )


def mutate_tree(rng: random.Random, node: Any) -> None:
    """Change a value, a number or a key somewhere in a JSON value, in place."""
    keys: Any = list(node) if isinstance(node, dict) else range(len(node))
    if not keys:
        return
    key = rng.choice(list(keys))
    child = node[key]
    if isinstance(child, list | dict) and child and rng.random() < 0.7:
        mutate_tree(rng, child)
    elif isinstance(child, int) and not isinstance(child, bool) and rng.random() < 0.5:
        node[key] = rng.choice((child + 1, child - 1, child * 2, rng.choice(_NUMBERS)))
    elif rng.random() < 0.1 and isinstance(node, dict):
        del node[key]
    else:
        node[key] = deepcopy(rng.choice(_ODD))


def use(update: Update, header: FileHeader | None = None) -> None:
    """Read all of what was accepted, if it is of a size that the seeds' files can mean."""
    if header is not None and header.carried is not None:
        for rows in header.carried.decoded().values():
            assert np.isfinite(rows).all(), "accepted directions are not finite"
    if update.spec.size > MAX_ACCEPTED_SIZE:
        return
    out = np.empty(update.spec.size, np.float32)
    update.read(0, out.size, out)
    assert np.isfinite(out).all(), "an accepted update has values that are not finite"


class Updates:
    """The decoder, of updates in a round and of update files."""

    name = "update"
    rooms = _DECODER

    def __init__(self) -> None:
        self._place = tempfile.TemporaryDirectory(dir=FAST_FOLDER)
        folder = Path(self._place.name)
        self.in_round, self.files = seeds(folder)
        self.specs = [spec for spec, _ in self.in_round]
        self.path = folder / "mutant.dare"

    def attempt(self, rng: random.Random) -> Attempt:
        if rng.random() < FILE_SHARE:
            blob = mutate_file(rng, rng.choice(self.files), lambda: rng.choice(self.files))
            if rng.random() < 0.5:
                blob = refitted(rng, blob)
            self.path.write_bytes(blob)
            return Attempt(
                lambda: use(*read_update_file(self.path)), lambda: self.files.append(blob)
            )
        spec, blob = rng.choice(self.in_round)
        blob = mutate(rng, blob, lambda: rng.choice(self.in_round)[1])
        if rng.random() < 0.5:
            blob = sealed(spec, blob)
        if rng.random() < 0.05:
            spec = rng.choice(self.specs)
        return Attempt(
            lambda: use(decode_update(blob, spec)), lambda: self.in_round.append((spec, blob))
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1_000_000)
    add_words(parser)
    words = parser.parse_args()
    show(pieces(Updates, words.count, seed=words.seed, seconds=words.seconds, out=words.out))


if __name__ == "__main__":
    main()

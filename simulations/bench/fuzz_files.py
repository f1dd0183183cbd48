"""Throw damaged files at every reader of a file: typed errors or a sound read, no hang, no bomb.

    python -m simulations.bench.fuzz_files --mutants 100000 --reader all

A mutant of a good file has bytes damaged or spliced, or, where it is or holds JSON, another value
at some place of it; lengths and checksums fit again in most, so that the checks behind them are
reached. Texts get what parsers choke on: nesting, aliases, huge numbers, halves of characters.
The rest of a reader's folder stays good. The loop is that of `simulations.bench.fuzzing`; update
files have a fuzzer of their own (`simulations.bench.fuzz_update`).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import struct
import tempfile
from copy import deepcopy
from functools import partial
from pathlib import Path

import dare_agg
from simulations.bench.file_readers.reader import Reader
from simulations.bench.file_readers.table import READERS
from simulations.bench.fuzz_update import mutate_tree
from simulations.bench.fuzzing import FAST_FOLDER, Attempt, add_words, damaged, pieces, show

_TOKENS = (
    b"[" * 5000, b'{"a":' * 500, b"[" * 70 + b"]" * 70, b"9" * 5000, b"-1", b"1e999", b"NaN",
    b"Infinity", b"true", b"null", b"[]", b"{}", b'""', b'"\\ud800"', b"\\", b"\0", b"\xff\xfe",
    "é".encode(), b"\n", b",", b":", b'"', b"'", b"- ", b"  ", b"&a ", b"*a", b"!!python/name:os ",
    b"<<: *a\n", b"a." * 100, b"9223372036854775808", b"0x10", b"1_000", b"2001-01-01",
    b"a: &a [x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: [*b,*b,*b,*b,*b,*b]\n",
    b"1:1:1:1:1:1:1", b"../../etc/passwd", b"/", b"x" * 300, b"---\n", b"# ", b"{", b"}", b"]",
)  # fmt: skip


class Files:
    """One reader, in a folder of its own in memory."""

    rooms = (str(Path(dare_agg.__file__).parent),)

    def __init__(self, name: str) -> None:
        self.name = f"file-{name}"
        self._place = tempfile.TemporaryDirectory(dir=FAST_FOLDER)
        folder = Path(self._place.name)
        os.environ["DARE_AGG_CACHE"] = str(folder / "cache")
        self.reader = READERS[name](folder)
        self.blobs = list(self.reader.seeds)
        _put(self.reader, self.blobs[0])
        self.reader.read()

    def attempt(self, rng: random.Random) -> Attempt:
        reader, blob = self.reader, rng.choice(self.blobs)
        if rng.random() < 0.1:
            blob = rng.choice(reader.seeds)
        mutant = self._mutant(rng, blob)
        _put(reader, mutant)

        def keep() -> None:
            if len(mutant) < 1 << 16:
                self.blobs.append(mutant)

        return Attempt(reader.read, keep)

    def _mutant(self, rng: random.Random, blob: bytes) -> bytes:
        reader = self.reader
        if reader.inner is not None and rng.random() < 0.7:
            try:
                text, put_back = reader.inner(rng, blob)
                mutant = _other_json(rng, text)
            except (ValueError, IndexError, KeyError, TypeError, RecursionError, struct.error):
                return damaged(rng, blob, lambda: rng.choice(self.blobs))
            return put_back(mutant)
        if reader.is_text and rng.random() < 0.6:
            return _other_text(rng, blob)
        mutant = damaged(rng, blob, lambda: rng.choice(self.blobs))
        if reader.fitted is not None and rng.random() < 0.7:
            return reader.fitted(mutant)
        return mutant


def _put(reader: Reader, content: bytes) -> None:
    reader.path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(reader.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(content)


def _other_json(rng: random.Random, text: bytes) -> bytes:
    """Another value at a place or two of a JSON text, or another text."""
    if rng.random() < 0.3:
        return _other_text(rng, text)
    value = json.loads(text)
    if not isinstance(value, list | dict):
        return _other_text(rng, text)
    value = deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        mutate_tree(rng, value)
    return json.dumps(value).encode()


def _other_text(rng: random.Random, text: bytes) -> bytes:
    """The text with a token more, or in place of another; a line twice or left out."""
    data = text
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at, kind = rng.randrange(len(data) + 1), rng.randrange(4)
        if kind == 0:
            data = data[:at] + rng.choice(_TOKENS) + data[at:]
        elif kind == 1:
            data = data[:at] + rng.choice(_TOKENS) + data[at + rng.randrange(1, 40) :]
        elif kind == 2:
            lines = data.split(b"\n")
            lines.insert(rng.randrange(len(lines) + 1), rng.choice(lines))
            data = b"\n".join(lines)
        else:
            lines = data.split(b"\n")
            del lines[rng.randrange(len(lines))]
            data = b"\n".join(lines)
    return data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutants", type=int, default=100_000, help="of each reader")
    parser.add_argument("--reader", choices=[*READERS, "all"], default="all")
    add_words(parser)
    words = parser.parse_args()
    for name in READERS if words.reader == "all" else (words.reader,):
        rows = pieces(
            partial(Files, name), words.mutants,
            seed=words.seed, seconds=words.seconds, out=words.out,
        )  # fmt: skip
        show(rows)


if __name__ == "__main__":
    main()

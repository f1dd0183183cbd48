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
import hashlib
import json
import os
import random
import shutil
import struct
import tempfile
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors.numpy import save

import dare_agg
from dare_agg.checkpoint import Checkpoint, carry_files, fingerprints, open_checkpoint
from dare_agg.checkpoint.fingerprints import recall, remember
from dare_agg.cli.progress import load_config, load_rows, secure_lines, summary_table
from dare_agg.codec.mask import parse_drop_rate
from dare_agg.deploy.identities import load_identity, read_identities
from dare_agg.downlink.base import STEPS, read_base, write_base
from dare_agg.downlink.client import VersionReceiver
from dare_agg.downlink.protocol import FullDownlink
from dare_agg.downlink.server import VersionDownlink
from dare_agg.downlink.steps import FAMILY, HEAD
from dare_agg.downlink.steps import _checksum as step_checksum
from dare_agg.errors import DareError
from dare_agg.offline.adapters.source import adapter_source
from dare_agg.offline.base import open_base
from dare_agg.offline.range_check import bases_named_by
from dare_agg.offline.recipe import make_recipe
from dare_agg.offline.recipe_file import read_recipe
from dare_agg.rounds.plan import make_plans
from dare_agg.rounds.state import StateFolder, pack_round, unpack_model, unpack_step
from dare_agg.rounds.step import StepState
from dare_agg.rounds.terms import UpdateTerms
from dare_agg.runs.log import Mirror, row_line, seconds_left, state_line
from dare_agg.runs.report import read_run, table_row
from dare_agg.runs.rows import RunRow
from dare_agg.secure import identity as identities
from dare_agg.secure.identity import (
    find_passphrase,
    new_identity,
    read_identity,
    read_public,
    read_trusted,
    write_identity,
    write_public,
)
from dare_agg.secure.kept_state import decode_state
from dare_agg.secure.ledger import FileLedger
from dare_agg.secure.roster import check_roster, make_roster, read_roster, sign_roster, write_roster
from dare_agg.secure.vault import Vault
from dare_agg.vectors.model import global_model
from dare_agg.vectors.sources import CachedSource
from simulations.bench.fuzz_secure import recordings
from simulations.bench.fuzz_update import mutate_tree
from simulations.bench.fuzzing import FAST_FOLDER, Attempt, add_words, damaged, pieces, show

PASSPHRASE = "a passphrase"
MOST_READ = 1 << 20
_TOKENS = (
    b"[" * 5000, b'{"a":' * 500, b"[" * 70 + b"]" * 70, b"9" * 5000, b"-1", b"1e999", b"NaN",
    b"Infinity", b"true", b"null", b"[]", b"{}", b'""', b'"\\ud800"', b"\\", b"\0", b"\xff\xfe",
    "é".encode(), b"\n", b",", b":", b'"', b"'", b"- ", b"  ", b"&a ", b"*a", b"!!python/name:os ",
    b"<<: *a\n", b"a." * 100, b"9223372036854775808", b"0x10", b"1_000", b"2001-01-01",
    b"a: &a [x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: [*b,*b,*b,*b,*b,*b]\n",
    b"1:1:1:1:1:1:1", b"../../etc/passwd", b"/", b"x" * 300, b"---\n", b"# ", b"{", b"}", b"]",
)  # fmt: skip

# The JSON of a file and what puts other JSON in its place.
Inner = tuple[bytes, Callable[[bytes], bytes]]


@dataclass(frozen=True)
class Reader:
    """``read`` reads ``path``, of which ``seeds`` are good contents.

    ``inner`` finds the JSON in a content; ``fitted`` mends lengths and checksums of bytes.
    """

    path: Path
    seeds: tuple[bytes, ...]
    read: Callable[[], object]
    inner: Callable[[random.Random, bytes], Inner] | None = None
    fitted: Callable[[bytes], bytes] | None = None
    is_text: bool = False


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


# --- where JSON lies in a file ---------------------------------------------------------------


def _all(rng: random.Random, blob: bytes) -> Inner:
    return blob, lambda text: text


def _line(rng: random.Random, blob: bytes) -> Inner:
    lines = blob.split(b"\n")
    at = rng.randrange(len(lines))
    return lines[at], lambda text: b"\n".join((*lines[:at], text, *lines[at + 1 :]))


def _header(rng: random.Random, blob: bytes) -> Inner:
    """The header of a safetensors file."""
    (length,) = struct.unpack_from("<Q", blob)
    body = blob[8 + length :]
    return blob[8 : 8 + length], lambda text: struct.pack("<Q", len(text)) + text + body


def _metadata(rng: random.Random, blob: bytes) -> Inner:
    """The header of a safetensors file, or the JSON that lies in its metadata."""
    text, put_back = _header(rng, blob)
    if rng.random() < 0.5:
        return text, put_back
    header = json.loads(text)
    words = header["__metadata__"]
    if not isinstance(words, dict) or not words:
        raise ValueError
    name = rng.choice(sorted(words))

    def put(new: bytes) -> bytes:
        words[name] = new.decode("utf-8", "replace")
        return put_back(json.dumps(header).encode())

    return str(words[name]).encode(), put


def _in_state(rng: random.Random, blob: bytes) -> Inner:
    text, put_back = _metadata(rng, blob[16:-32])
    return text, lambda new: _state_of(put_back(new))


def _state_of(body: bytes) -> bytes:
    head = b"DAREST1\n" + struct.pack("<Q", len(body))
    return head + body + hashlib.sha256(head + body).digest()


def _state_fitted(blob: bytes) -> bytes:
    return _state_of(blob[16:-32])


# --- readers -----------------------------------------------------------------------------------


def _arrays() -> dict[str, np.ndarray]:
    numbers = np.random.default_rng(3)
    return {
        "a.weight": numbers.normal(size=(6, 5)).astype(np.float32),
        "b.bias": numbers.normal(size=7).astype(np.float32),
        "head.weight": numbers.normal(size=(2, 3)).astype(np.float32),
    }


def _state(folder: Path, name: str = "round-00000003.state") -> Reader:
    model, downlink = global_model(_arrays(), dense=("head.*",)), FullDownlink()
    kept = StateFolder(folder / "state")
    kept.save_base(_arrays())
    step = StepState(3, {"momentum": np.ones(model.delta.size, np.float32)})
    facts = {"secret": "ab" * 16, "rows": [{"round": 1}]}
    kept.save(pack_round(3, model, step, facts, downlink))
    path = kept.path / name

    def read() -> None:
        found = StateFolder(kept.path)
        state, _ = found.load()
        assert state is not None
        base = global_model(found.load_base(), dense=("head.*",))
        unpack_model(state, base, downlink)
        unpack_step(state)
        state.raw("secret")

    return Reader(path, (path.read_bytes(),), read, _in_state, _state_fitted)


def _base(folder: Path) -> Reader:
    path = folder / "base.safetensors"
    seeds = write_base(_arrays()), save(_arrays())
    return Reader(path, seeds, lambda: read_base(path), _metadata)


def _versions(folder: Path, which: str) -> Reader:
    model = global_model(_arrays())
    sender = VersionDownlink("union-i8")
    moved, terms = sender.start(model), UpdateTerms(parse_drop_rate("0.5"))
    steps = []
    for number in (1, 2):
        plans = make_plans(b"s" * 32, number, [None, None], terms, moved.ref)
        change = np.full(model.delta.size, 0.25, np.float32)
        moved = sender.advance(moved, change, None, plans)
        steps.append(sender.broadcast(moved, sender.base_version).payloads[STEPS])
    base, version = sender.base_version, moved.ref.version
    cache = folder / "versions"

    def receiver() -> VersionReceiver:
        return VersionReceiver(cache, "client", base)

    receiver().adopt(_arrays())
    receiver().receive(version, {STEPS: steps[-1]}, None)
    (kept,), (head,) = (tuple((cache / part).iterdir()) for part in ("bases", "heads"))
    whole = {kept: kept.read_bytes(), head: head.read_bytes()}
    path = {"base": kept, "head": head, "steps": folder / "steps"}[which]

    def read() -> None:
        # A refusal has it forget what it holds.
        for place, content in whole.items():
            if place != path:
                place.write_bytes(content)
        if which == "steps":
            head.unlink()
        one = receiver()
        one.have()
        sent = {STEPS: path.read_bytes()} if which == "steps" else {}
        got = one.receive(version, sent, None)
        assert global_model(got).ref.version == version, "another version was taken"

    if which == "steps":
        return Reader(path, tuple(reversed(steps)), read, None, _step_fitted)
    if which == "head":
        return Reader(path, (whole[head],), read, _in_state, _state_fitted)
    return Reader(path, (whole[kept],), read, _metadata)


def _step_fitted(blob: bytes) -> bytes:
    """Steps whose checksums fit, as far as their lengths lead."""
    data, at = bytearray(blob), 0
    while len(data) - at >= HEAD.size:
        families, payload = (
            struct.unpack_from("<H", data, at + 92)[0],
            HEAD.unpack_from(data, at)[12],
        )
        stop = at + HEAD.size + families * FAMILY.size + payload
        if stop > len(data):
            break
        head = bytes(data[at : at + HEAD.size - 8]) + bytes(8)
        rest = bytes(data[at + HEAD.size : stop])
        data[at + HEAD.size - 8 : at + HEAD.size] = step_checksum(head, rest, b"")
        at = stop
    return bytes(data)


def _roster(folder: Path) -> Reader:
    path, coordinator = folder / "roster.json", new_identity("coordinator")
    members = [(f"party {number}", new_identity("one").public) for number in range(4)]
    write_roster(path, sign_roster(make_roster("fuzz", members), coordinator))

    def read() -> None:
        check_roster(read_roster(path), [coordinator.public])

    return Reader(path, (path.read_bytes(),), read, _all)


def _identity(folder: Path) -> Reader:
    path, own = folder / "own.key", new_identity("own")
    # The passphrase is stretched as always, only not as far.
    quick = partial(patch.object, identities, "_SCRYPT_N", 1 << 4)
    with quick():
        write_identity(path, own, PASSPHRASE)

    def read() -> None:
        read_public(path)
        with quick():
            assert read_identity(path, PASSPHRASE).public == own.public

    return Reader(path, (path.read_bytes(),), read, _all)


def _public(folder: Path) -> Reader:
    path = folder / "own.pub"
    write_public(path, "own", new_identity("own").public)

    def read() -> None:
        read_public(path)
        assert len(read_trusted(path)) == 32

    return Reader(path, (path.read_bytes(),), read, _all)


def _passphrase(folder: Path) -> Reader:
    path = folder / "passphrase"
    return Reader(path, (b"a passphrase\n",), lambda: find_passphrase(path), is_text=True)


def _pem(folder: Path) -> Reader:
    path, key = folder / "client.pem", Ed25519PrivateKey.generate()
    text = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return Reader(path, (text,), lambda: load_identity(path), is_text=True)


def _identities(folder: Path) -> Reader:
    path = folder / "identities.json"
    known = {f"client {number}": os.urandom(32).hex() for number in range(3)}
    return Reader(path, (json.dumps(known).encode(),), lambda: read_identities(path), _all)


def _ledger(folder: Path) -> Reader:
    path, run = folder / "own.ledger", recordings(7)[0]
    book, size = FileLedger(path), run.terms.size
    book.claim(run.terms, np.ones(size, np.float32), (bytes(32),))
    book.sign(run.terms, run.terms.cohort)
    later = recordings(8)[1].terms

    def read() -> None:
        before = path.read_bytes()
        try:
            book.claim(later, np.full(size, 2, np.float32))
        except DareError:
            assert path.read_bytes() == before, "a refusal changed the ledger"
            raise
        assert book.entries()[-1].session == later.session.hex()

    return Reader(path, (path.read_bytes(),), read, _line)


def _vault(folder: Path) -> Reader:
    run = recordings(7)[0]
    vault, session = Vault(folder / "vault", run.identities[2]), run.terms.session
    vault.put(session, "state", run.kept["sign"][2])
    (path,) = vault.folder.iterdir()

    def read() -> None:
        assert decode_state(vault.get(session, "state")).party == 2

    return Reader(path, (path.read_bytes(),), read)


def _kept(folder: Path) -> Reader:
    """What a vault seals, as if somebody could seal another."""
    path = folder / "state"
    seeds = tuple(kept[2] for run in recordings(7) for kept in run.kept.values() if 2 in kept)
    return Reader(path, seeds, lambda: decode_state(path.read_bytes()))


def _fingerprints(folder: Path) -> Reader:
    model, name = folder / "model.safetensors", "ab" * 32
    model.write_bytes(save(_arrays()))
    os.utime(model, (1, 1))
    with patch.object(fingerprints, "_SETTLED_SECONDS", -1.0):
        remember([model], name, "cd" * 32)
    (path,) = (folder / "cache" / "fingerprints").iterdir()

    def read() -> None:
        found = recall([model], name)
        assert found is None or len(bytes.fromhex(found)) == 32

    return Reader(path, (path.read_bytes(),), read, is_text=True)


def _checkpoint(folder: Path, which: str) -> Reader:
    first, second = folder / "model" / "a.safetensors", folder / "model" / "b.safetensors"
    index = folder / "model" / "model.safetensors.index.json"
    arrays = _arrays()
    first.parent.mkdir()
    half = {"half": np.ones((3, 3), np.float16), "count": np.ones(3, np.int64)}
    first.write_bytes(save({"a.weight": arrays["a.weight"]}))
    second.write_bytes(save({"b.bias": arrays["b.bias"], **half}, {"format": "pt"}))
    weights = {"a.weight": first.name, "b.bias": second.name, "half": second.name}
    index.write_text(json.dumps({"metadata": {"total_size": 4}, "weight_map": weights}))
    path = {"file": second, "shard": second, "index": index}[which]
    opened = second if which == "file" else folder / "model"

    def read() -> None:
        _use(open_checkpoint(opened))

    return Reader(path, (path.read_bytes(),), read, _all if which == "index" else _header)


def _use(found: Checkpoint) -> None:
    layout = found.layout()
    if layout.size <= MOST_READ:
        found.vector(layout)
        found.check_finite(layout)
        found.fingerprint(layout)


def _folder(folder: Path, name: str) -> Reader:
    """The files of a model folder that are carried or asked for the base."""
    model, out = folder / "model", folder / "out"
    model.mkdir()
    contents = {
        "config.json": {"auto_map": {"AutoModel": "x.py--Model"}, "hidden": [1, {"a": None}],
                        "_name_or_path": "base", "custom_pipelines": {"a": {"impl": "b"}}},
        "modules.json": [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.X"}],
        "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["x.py--T", None]}, "model": 5},
        "adapter_config.json": {"base_model_name_or_path": "base", "peft_type": "LORA"},
    }  # fmt: skip
    for file, value in contents.items():
        (model / file).write_text(json.dumps(value))
    (model / "README.md").write_text(
        "---\nbase_model:\n- one\n- two\ntags: &t [merge, dare]\nmore: *t\n---\n\n# A model\n"
    )
    path = model / name

    def read() -> None:
        bases_named_by([model])
        out.mkdir()
        try:
            carry_files(model, out)
        finally:
            shutil.rmtree(out)

    is_text = name == "README.md"
    return Reader(path, (path.read_bytes(),), read, None if is_text else _all, is_text=is_text)


def _adapter(folder: Path, which: str) -> Reader:
    base_path, adapter = folder / "base.safetensors", folder / "adapter"
    adapter.mkdir()
    base_path.write_bytes(save(_arrays()))
    base = open_base(base_path, [])
    layout = base.layout
    cached = CachedSource(base.checkpoint.reader(layout))
    left, right = np.ones((6, 2), np.float32), np.ones((2, 5), np.float32)
    prefix = "base_model.model.a"
    factors = {f"{prefix}.lora_A.weight": right, f"{prefix}.lora_B.weight": left,
               "base_model.model.b.bias": np.ones(7, np.float32)}  # fmt: skip
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_rslora": False,
              "fan_in_fan_out": False, "alpha_pattern": {"a": 8}, "use_dora": False,
              "base_model_name_or_path": "base"}  # fmt: skip
    (adapter / "adapter_model.safetensors").write_bytes(save(factors))
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    path = adapter / ("adapter_config.json" if which == "config" else "adapter_model.safetensors")

    def read() -> None:
        source, out = adapter_source(adapter, base, cached), np.empty(layout.size, np.float32)
        source.read(0, layout.size, out)

    return Reader(path, (path.read_bytes(),), read, _all if which == "config" else _header)


_RECIPE = {
    "base": "base", "method": "ties", "scaling": 0.7, "drop-rate": "0.5", "seed": 3,
    "models": ["one", {"path": "two", "options": {"density": 0.5}}], "exclude": ["head.*"],
    "options": {"density": 0.5}, "rules": [{"match": "a.*", "scaling": 0.5}], "out": "merged",
}  # fmt: skip
_RECIPES = {
    "yaml": b"""base: base
method: ties
scaling: 0.7
drop-rate: 0.5
options: &o {density: 0.5}
models:
- one
- path: two
  options: *o
exclude: ['head.*']
rules:
- match: 'a.*'
  scaling: 0.5
""",
    "toml": b"""base = "base"
method = "ties"
scaling = 0.7
models = ["one", {path = "two", options = {density = 0.5}}]
exclude = ['head.*']
[options]
density = 0.5
[[rules]]
match = "a.*"
scaling = 0.5
""",
    "json": json.dumps(_RECIPE).encode(),
}


def _recipe(folder: Path, kind: str) -> Reader:
    path = folder / f"recipe.{kind}"

    def read() -> None:
        values = read_recipe(path).values
        values.pop("out", None)
        make_recipe(values)

    inner = _all if kind == "json" else None
    return Reader(path, (_RECIPES[kind],), read, inner, is_text=True)


def _run(folder: Path, name: str) -> Reader:
    run = folder / "run"
    run.mkdir()
    rows = [
        {"round": number, "method": method, "accuracy": 0.5, "loss": 1.25, "accepted": 3,
         "update_bytes_per_client": 1000.0, "dense_bytes_per_client": 10, "clients": 3,
         "upload_bytes_per_client": 1010.0, "download_bytes_per_client": 5000, "seconds": 12.5,
         "round_seconds": 6.0, "survivors_per_element": 1.5, "sign_conflict": 0.1,
         "delta_max": 0.01, "parameters": 43, "rejected": [{"client": 1, "reason": "late"}]}
        for method in ("fedavg", "dare-ties") for number in (1, 2)
    ]  # fmt: skip
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    state = {"config": {"num-rounds": 2, "methods": ["fedavg"], "train": "all", "model": "x"},
             "fingerprints": {"fedavg": "ab"}, "token": "t"}  # fmt: skip
    (run / "run.json").write_text(json.dumps(state))
    path = run / name

    def read() -> None:
        for one in read_run(run, histograms=True):
            table_row(one)
        rows, config = load_rows(run), load_config(run)
        seconds_left(rows, config)
        summary_table(rows)
        secure_lines(rows, run)

    return Reader(path, (path.read_bytes(),), read, _line if name == "metrics.jsonl" else _all)


def _log(folder: Path) -> Reader:
    """Lines of a run's log, which hold rows and states for a folder elsewhere."""
    path, copy = folder / "run.log", folder / "copy"
    token = "ab" * 16
    state = {"token": token, "config": {"num-rounds": 2}}
    row = {"round": 1, "method": "fedavg", "accuracy": 0.5}
    text = state_line(state) + "\n" + row_line(RunRow(row), token) + "\n"
    copy.mkdir()

    def read() -> None:
        for place in copy.iterdir():
            place.unlink()
        mirror = Mirror(copy)
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            mirror.take(line)

    return Reader(path, (text.encode(),), read, is_text=True)


READERS: Mapping[str, Callable[[Path], Reader]] = {
    "state": _state,
    "state-base": partial(_state, name="base.state"),
    "version-base": _base,
    "version-cached": partial(_versions, which="base"),
    "version-head": partial(_versions, which="head"),
    "version-steps": partial(_versions, which="steps"),
    "roster": _roster,
    "identity": _identity,
    "public-key": _public,
    "passphrase": _passphrase,
    "client-key": _pem,
    "identities": _identities,
    "ledger": _ledger,
    "vault": _vault,
    "kept-state": _kept,
    "fingerprints": _fingerprints,
    "safetensors": partial(_checkpoint, which="file"),
    "shard": partial(_checkpoint, which="shard"),
    "index": partial(_checkpoint, which="index"),
    "config": partial(_folder, name="config.json"),
    "modules": partial(_folder, name="modules.json"),
    "card": partial(_folder, name="README.md"),
    "adapter": partial(_adapter, which="weights"),
    "adapter-config": partial(_adapter, which="config"),
    "recipe-yaml": partial(_recipe, kind="yaml"),
    "recipe-toml": partial(_recipe, kind="toml"),
    "recipe-json": partial(_recipe, kind="json"),
    "metrics": partial(_run, name="metrics.jsonl"),
    "run": partial(_run, name="run.json"),
    "log": _log,
}


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

"""Files of rounds: states, bases, versions and their steps."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from dare_agg.codec.mask import parse_drop_rate
from dare_agg.downlink.base import STEPS, read_base, write_base
from dare_agg.downlink.client import VersionReceiver
from dare_agg.downlink.protocol import FullDownlink
from dare_agg.downlink.server import VersionDownlink
from dare_agg.downlink.steps import FAMILY, HEAD
from dare_agg.downlink.steps import _checksum as step_checksum
from dare_agg.rounds.plan import make_plans
from dare_agg.rounds.state import StateFolder, pack_round, unpack_model, unpack_step
from dare_agg.rounds.step import StepState
from dare_agg.rounds.terms import UpdateTerms
from dare_agg.vectors.model import global_model
from simulations.bench.file_readers.reader import (
    Reader,
    in_state,
    metadata,
    sample_arrays,
    state_fitted,
)


def state_reader(folder: Path, name: str = "round-00000003.state") -> Reader:
    """A kept round, or the base beside it."""
    model, downlink = global_model(sample_arrays(), dense=("head.*",)), FullDownlink()
    kept = StateFolder(folder / "state")
    kept.save_base(sample_arrays())
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

    return Reader(path, (path.read_bytes(),), read, in_state, state_fitted)


def base_reader(folder: Path) -> Reader:
    """A client's base."""
    path = folder / "base.safetensors"
    seeds = write_base(sample_arrays()), save(sample_arrays())
    return Reader(path, seeds, lambda: read_base(path), metadata)


def versions_reader(folder: Path, which: str) -> Reader:
    """What a client keeps of versions, or is sent."""
    model = global_model(sample_arrays())
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

    receiver().adopt(sample_arrays())
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
        return Reader(path, (whole[head],), read, in_state, state_fitted)
    return Reader(path, (whole[kept],), read, metadata)


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

"""Flower tests without processes: an in-memory grid and a toy app."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from dare_agg.secure import identity as identities
from dare_agg.secure.identity import new_identity, write_identity, write_public
from dare_agg.secure.roster import make_roster, sign_roster, write_roster
from simulations.runs.memory_grid import MemoryGrid, pretend_task

# Helpers stand beside the tests; importlib mode puts no test folder on the path.
sys.path.insert(0, str(Path(__file__).parent))
from toy import record_of, toy_app, toy_arrays, toy_delta


@pytest.fixture(autouse=True)
def task_identity(tmp_path, monkeypatch):
    pretend_task()
    # Two runs at a time with clients of the same names would take each other's versions.
    monkeypatch.setenv("DARE_AGG_CACHE", str(tmp_path / "cache"))
    # What these tests write outlives a process that is killed, and need not outlive a power cut.
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(autouse=True, scope="module")
def small_heap():
    """Flower collects garbage after each reply it reads: seconds a time in a whole suite's heap."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def memory_grid():
    return MemoryGrid


@pytest.fixture
def toys():
    """The toy model and app as one object."""

    class Toys:
        arrays = staticmethod(toy_arrays)
        app = staticmethod(toy_app)
        delta = staticmethod(toy_delta)

        record = staticmethod(record_of)

    return Toys


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the folder of keys of ``n`` parties, party i on partition i."""
    # The passphrase is stretched as always, only not as far: tests open many identities.
    monkeypatch.setattr(identities, "_SCRYPT_N", 1 << 4)
    monkeypatch.setenv("DARE_AGG_PASSPHRASE", "a passphrase")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))

    def make(n: int, members: int | None = None) -> Path:
        folder = tmp_path / "keys"
        folder.mkdir()
        parties = [new_identity(f"site {i}") for i in range(n)]
        for number, party in enumerate(parties):
            write_identity(folder / f"party-{number}.key", party, "a passphrase")
        coordinator = new_identity("coordinator")
        write_public(folder / "coordinator.pub", "coordinator", coordinator.public)
        listed = [(p.name, p.public) for p in parties[: members or n]]
        write_roster(folder / "roster.json", sign_roster(make_roster("trio", listed), coordinator))
        monkeypatch.setenv("DARE_AGG_SECURE_KEYS", str(folder))
        return folder

    return make

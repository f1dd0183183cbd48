"""Federations of tiny torch models, without processes."""

from __future__ import annotations

import pytest

from simulations.runs.memory_grid import MemoryGrid, pretend_task


@pytest.fixture(autouse=True)
def task_identity(tmp_path, monkeypatch):
    pretend_task()
    monkeypatch.setenv("DARE_AGG_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def memory_grid():
    return MemoryGrid

"""Attacks, a folder an adversary, each test named after what it attempts."""

import os
import sys
from pathlib import Path

import pytest

from simulations.runs.memory_grid import pretend_task

# The guarded parties of these tests, the consortium and the toy app of others.
for room in ("secure", "flower", "attacks"):
    sys.path.insert(0, str(Path(__file__).parents[1] / room))


@pytest.fixture(autouse=True)
def task_identity(monkeypatch):
    pretend_task()
    # What these tests write outlives a process that is killed, and need not outlive a power cut.
    monkeypatch.setattr(os, "fsync", lambda handle: None)

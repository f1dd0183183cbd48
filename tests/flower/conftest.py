"""Flower tests without processes: an in-memory grid and a toy app."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord

from simulations.runs.memory_grid import MemoryGrid, pretend_task

# Helpers stand beside the tests; importlib mode puts no test folder on the path.
sys.path.insert(0, str(Path(__file__).parent))
from toy import toy_app, toy_arrays, toy_delta


@pytest.fixture(autouse=True)
def task_identity():
    pretend_task()


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

        @staticmethod
        def record(arrays: dict[str, np.ndarray]) -> ArrayRecord:
            return ArrayRecord({name: Array(array) for name, array in arrays.items()})

    return Toys

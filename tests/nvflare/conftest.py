"""Sites without NVFlare, and NVFlare's own simulator where it is installed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

# Helpers stand beside the tests; importlib mode puts no test folder on the path.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DARE_AGG_CACHE", str(tmp_path / "cache"))

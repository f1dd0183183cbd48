"""What runs learn from where no data set is asked for."""

from __future__ import annotations

import numpy as np
import pytest

from simulations.runs import digits


@pytest.fixture
def made_up_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random pictures and labels in place of the digits."""
    rng = np.random.default_rng(0)
    pixels, labels = rng.random((400, 64)).astype(np.float32), rng.integers(0, 10, 400)
    rows = digits.Digits(pixels, labels, pixels[:50], labels[:50])
    monkeypatch.setattr(digits, "load_digits", lambda: rows)

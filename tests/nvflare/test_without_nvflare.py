"""Where NVFlare is not installed."""

import importlib.util

import pytest


def test_a_recipe_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"DareRecipe needs NVFlare: pip install 'dare-agg\["):
        from dare_agg.nvflare import DareRecipe  # noqa: F401

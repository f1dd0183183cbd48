"""DARE on NVFlare: recipes of jobs, the server's controller and the clients' filter.

An existing FedAvg job becomes a DARE job by the recipe's name::

    from dare_agg.nvflare import DareRecipe        # was: nvflare.app_opt.pt.recipes.FedAvgRecipe

and its training script stays as it is. The only room that imports NVFlare (extra ``nvflare``).
"""

import importlib
import importlib.util
from typing import Any

_LENT = {
    "DareFedAvg": "controller",
    "DareFilter": "filter",
    "DareRecipe": "recipe",
    "NumpyDareRecipe": "recipe",
}
__all__ = ["DareFedAvg", "DareFilter", "DareRecipe", "NumpyDareRecipe"]


def __getattr__(name: str) -> Any:
    if name not in _LENT:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if importlib.util.find_spec("nvflare") is None:
        raise ImportError(f"{name} needs NVFlare: pip install 'dare-agg[nvflare]'")
    return getattr(importlib.import_module(f"dare_agg.nvflare.{_LENT[name]}"), name)

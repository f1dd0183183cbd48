"""DARE on Flower: a strategy for the ServerApp and a mod for the ClientApp.

Two lines turn a FedAvg app into a DARE one::

    strategy = DareStrategy(...)            # instead of FedAvg(...)
    app = ClientApp(mods=[dare_mod])        # training code untouched

and ``dare(FedYogi(...))`` carries any of Flower's own strategies.
"""

import importlib

# Of what is lent here nothing is imported before it is asked for: a client's process starts for
# every message and needs nothing of the strategy. Types stand in __init__.pyi.
_LENT = {
    "STATISTICS_KEY": "records",
    "DareStrategy": "strategy",
    "RoundOutcome": "round_outcome",
    "dare": "around",
    "dare_mod": "mod",
    "offer_base": "reception",
}
__all__ = ["STATISTICS_KEY", "DareStrategy", "RoundOutcome", "dare", "dare_mod", "offer_base"]


def __getattr__(name: str) -> object:
    if name not in _LENT:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"dare_agg.flower.{_LENT[name]}"), name)
    globals()[name] = found
    return found

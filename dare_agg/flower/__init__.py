"""DARE on Flower: a strategy for the ServerApp and a mod for the ClientApp.

Two lines turn a FedAvg app into a DARE one::

    strategy = DareStrategy(...)            # instead of FedAvg(...)
    app = ClientApp(mods=[dare_mod])        # training code untouched

and ``dare(FedYogi(...))`` carries any of Flower's own strategies.
"""

from dare_agg.flower.around import dare
from dare_agg.flower.mod import dare_mod
from dare_agg.flower.reception import offer_base
from dare_agg.flower.records import STATISTICS_KEY
from dare_agg.flower.round_outcome import RoundOutcome
from dare_agg.flower.strategy import DareStrategy

__all__ = ["STATISTICS_KEY", "DareStrategy", "RoundOutcome", "dare", "dare_mod", "offer_base"]

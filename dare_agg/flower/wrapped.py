"""Which of Flower's strategies `dare` can carry, and why the others cannot be."""

from __future__ import annotations

from collections.abc import Mapping

from flwr.serverapp.strategy import (
    Bulyan,
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedMedian,
    FedTrimmedAvg,
    FedXgbBagging,
    FedXgbCyclic,
    Krum,
    MultiKrum,
    QFedAvg,
    Strategy,
)

from dare_agg.errors import ConfigError
from dare_agg.flower.round_strategy import RoundStrategy

_TREES = "its clients send trees, and trees have no difference that a mask could thin; use it as is"
_PRIVACY = (
    "its clipping and noise belong around what is transported; put it outside: "
    "{name}(dare(strategy, …), …)"
)
_OURS = "it transports by DARE already; give it the words themselves"
# Kind → why it is refused.
REFUSED: Mapping[type, str] = {
    FedXgbBagging: _TREES,
    FedXgbCyclic: _TREES,
    DifferentialPrivacyClientSideAdaptiveClipping: _PRIVACY,
    DifferentialPrivacyClientSideFixedClipping: _PRIVACY,
    DifferentialPrivacyServerSideAdaptiveClipping: _PRIVACY,
    DifferentialPrivacyServerSideFixedClipping: _PRIVACY,
    RoundStrategy: _OURS,
}
# These look at several clients' values of one parameter, at distances, or at norms.
COMPARING = (Bulyan, FedMedian, FedTrimmedAvg, Krum, MultiKrum, QFedAvg)
# Most of an update's squared error, relative to the update, that they are given.
MOST_ERROR = 0.05


def check_wrapped(strategy: object) -> None:
    """Raise `ConfigError`, with the reason, for what `dare` cannot carry."""
    if not isinstance(strategy, Strategy):
        made = isinstance(strategy, type) and issubclass(strategy, Strategy)
        name = getattr(strategy, "__name__", repr(strategy))
        remedy = f"make one: dare({name}(…))" if made else "give one, as in dare(FedYogi(…))"
        raise ConfigError(f"dare() was given {name}, which is no strategy; {remedy}")
    for kind, why in REFUSED.items():
        if isinstance(strategy, kind):
            name = type(strategy).__name__
            raise ConfigError(f"dare() cannot carry {name}: {why.format(name=name)}")


def compares(strategy: Strategy) -> bool:
    """Whether a strategy holds clients' updates against each other."""
    return isinstance(strategy, COMPARING)

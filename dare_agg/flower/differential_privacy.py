"""Flower's differential privacy around the strategy: allowed where it holds, else refused.

Its wrappers clip the change of each of n clients to a norm C and add noise of z·C/n: as much as
one client can move the mean of all. So what is merged must be of norm C at most, and the merge
must be that mean.

Clipped on the server, the arrays that are merged are those that were clipped, at any drop rate.
Clipped on the client, what comes after the clipping counts: an update of error ω
(`dare_agg.rounds.noise.error_of`) arrives with norm C·√(1 + ω), 4·C at p = .9, "b1". Noise that a
client adds itself (`LocalDpMod`, behind `dare_mod`) loses nothing on the way: what is sent is
made of noised values alone.
"""

from __future__ import annotations

import inspect
import logging
import math
import re
from collections.abc import Mapping, Sequence

from flwr.app import ConfigRecord
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    Strategy,
)

from dare_agg.downlink.protocol import Downlink
from dare_agg.errors import ConfigError
from dare_agg.merge.methods import MEANS
from dare_agg.rounds.noise import error_of
from dare_agg.rounds.plan import RoundPlan
from dare_agg.rounds.settings import WEIGHTINGS, FederatedSettings
from dare_agg.vectors.model import Groups

LOG = logging.getLogger("flwr")
# Those that clip on the client, and their like that clips on the server.
CLIENT_SIDE: Mapping[type[Strategy], type[Strategy]] = {
    DifferentialPrivacyClientSideFixedClipping: DifferentialPrivacyServerSideFixedClipping,
    DifferentialPrivacyClientSideAdaptiveClipping: DifferentialPrivacyServerSideAdaptiveClipping,
}
WRAPPERS = (*CLIENT_SIDE, *CLIENT_SIDE.values())
# Of the app's config: the norm that Flower's mods clip to.
CLIPPING_WORD = "clipping_norm"
KEEPS_NORMS = "drop_rate=0, values='f32', dense_values='f32'"


def check_privacy(
    config: ConfigRecord,
    settings: FederatedSettings,
    downlink: Downlink,
    plans: Sequence[RoundPlan],
    groups: Groups,
) -> None:
    """Raise `ConfigError` where a wrapper's noise would not cover what one client can do.

    To be called while the wrapper, if there is one, has a round configured.
    """
    wrapper = privacy_wrapper()
    enlarged = next(filter(None, map(_enlarged, plans)), "")
    first = plans[0].round == 1
    if wrapper is None:
        if enlarged and first and CLIPPING_WORD in config:
            LOG.warning(
                "the config has %r, which Flower's clipping mods read: %s; where more than the "
                "training depends on it, send updates whole: %s",
                CLIPPING_WORD,
                enlarged,
                KEEPS_NORMS,
            )
        return
    name = type(wrapper).__name__
    for clipping, on_server in CLIENT_SIDE.items():
        if enlarged and isinstance(wrapper, clipping):
            raise ConfigError(
                f"{name}: {enlarged}, and the noise is measured for the norm itself; use "
                f"{on_server.__name__}, which clips what is merged, or send updates whole: "
                f"{KEEPS_NORMS}"
            )
    _check_mean(name, settings, downlink)
    _check_counters(name, groups)
    if first and WEIGHTINGS[settings.weighting]:
        LOG.warning(
            "%s measures its noise for clients that weigh alike, and here, as in FedAvg, one with "
            "more examples moves the model by more; have all report one number, as "
            "DareStrategy(weighting='equal') does",
            name,
        )


def privacy_wrapper() -> Strategy | None:
    """The wrapper on whose behalf this code runs: a strategy is not told who calls it."""
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, WRAPPERS):
            return caller
        frame = frame.f_back
    return None


def _enlarged(plan: RoundPlan) -> str:
    """What becomes of a norm that was clipped before this plan's update was made, "" if nothing."""
    terms = plan.terms
    dense = plan.model.dense_size > 0 and terms.dense_values != "f32"
    if terms.drop_rate.p == 0 and terms.values == "f32" and not dense:
        return ""
    factor = math.sqrt(1 + error_of(terms.drop_rate, terms.values))
    beside = f" (dense tensors {terms.dense_values!r})" if dense else ""
    return (
        f"a norm clipped on the client does not hold for what is merged: drop rate "
        f"{terms.drop_rate.p:g} with values {terms.values!r}{beside} makes it about {factor:.3g} "
        "times as large"
    )


def _check_mean(name: str, settings: FederatedSettings, downlink: Downlink) -> None:
    step = settings.server_step
    if settings.robust is not None:
        raise ConfigError(
            f"{name}: its noise covers the mean of what clients changed, and robust = "
            f"{str(settings.robust)!r} makes something else of it; leave one of them out"
        )
    if (
        settings.method not in MEANS
        or settings.options
        or settings.scaling > 1
        or step.name != "plain"
        or step.numbers["lr"] > 1
    ):
        options = f" {dict(settings.options)}" if settings.options else ""
        raise ConfigError(
            f"{name}: its noise covers the mean of what clients changed; method "
            f"{settings.method!r}{options} with scaling {settings.scaling:g} and server step "
            f"{step.name} {dict(step.numbers)} moves the model otherwise: take "
            "method='task-arithmetic' without options, scaling of at most 1 and "
            "server_step='plain'"
        )
    if downlink.facts():
        raise ConfigError(
            f"{name}: downlink {downlink.name!r} rounds the mean before noise is added, by more "
            "than one client can move it; leave downlink out (the full arrays)"
        )


def _check_counters(name: str, groups: Groups) -> None:
    """Raise `ConfigError` for integers that would travel: noise below 1 leaves them as they are."""
    if groups.integers:
        last = sorted({name.rpartition(".")[2] for name in groups.integers})
        patterns = [rf"(^|\.){re.escape(one)}$" for one in last]
        raise ConfigError(
            f"{name}: integer tensors ({groups.integers[0]!r}, {len(groups.integers)} in all) are "
            "merged as whole numbers, which its noise does not hide; leave them at the clients: "
            f"exclude={patterns}"
        )


__all__ = ["CLIENT_SIDE", "WRAPPERS", "check_privacy", "privacy_wrapper"]

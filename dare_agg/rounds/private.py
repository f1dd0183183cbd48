"""A round whose merge keeps clients' privacy: clipped, noised, over a fixed number of clients.

As `dare_agg.rounds.server.merge_round`, whose mean it replaces. What comes after, scaling,
server step and downlink, sees the release alone and costs no privacy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dare_agg.errors import ConfigError, MergeError, refuse
from dare_agg.merge.methods import MEANS
from dare_agg.privacy.banded import Places
from dare_agg.privacy.central import Contribution, contribution
from dare_agg.privacy.clients import PrivateRun
from dare_agg.privacy.spaced import SpacedRun
from dare_agg.rounds.noise import norm_of
from dare_agg.rounds.plan import RoundPlan
from dare_agg.rounds.server import Accepted, MergedRound
from dare_agg.rounds.settings import WEIGHTINGS, FederatedSettings
from dare_agg.vectors.forms import whole_tensors
from dare_agg.vectors.model import GlobalModel


def check_private_settings(settings: FederatedSettings) -> None:
    """Raise `ConfigError` where a release would not be a clipped sum of clients alike."""
    refusals: tuple[tuple[object, str], ...] = (
        (settings.method not in MEANS or settings.options,
         f"method {settings.method!r}: one client moves its result by more than the norm; take "
         "method='task-arithmetic' without options"),
        (WEIGHTINGS[settings.weighting],
         f"weighting {settings.weighting!r} gives a client with more examples more than the norm; "
         "set weighting = equal"),
        (settings.terms.keep_rates != "uniform",
         f"keep rates {settings.terms.keep_rates!r} keep other elements of each client; set "
         "keep_rates = uniform"),
    )  # fmt: skip
    refuse(refusals, "privacy of clients with")


def check_private_model(model: GlobalModel) -> None:
    """Raise `ConfigError` for tensors that noise ruins or does not hide."""
    groups = model.groups
    if groups.integers:
        raise ConfigError(
            f"privacy of clients: integer tensors ({groups.integers[0]!r}, {len(groups.integers)} "
            "in all) are whole numbers, which noise below 1 leaves as they are; leave them at the "
            "clients: exclude"
        )
    if running := sorted(whole_tensors(model.arrays()) & set(groups.dense_layout.names)):
        raise ConfigError(
            f"privacy of clients: {running[0]!r} and {len(running) - 1} more look like running "
            "statistics, which noise turns below zero; leave them at the clients (exclude), train "
            "with layer or group norm, or send a list of arrays by name"
        )


def private_round(
    model: GlobalModel,
    plan: RoundPlan,
    accepted: Sequence[Accepted],
    settings: FederatedSettings,
    run: PrivateRun | SpacedRun,
    names: Sequence[str] = (),
) -> MergedRound:
    """Release the accepted updates of a round, none of them too, and charge it to the budget.

    ``plan`` is any of the round's: all clients share its mask; ``names`` are theirs, by their
    number in the round. Raises `MergeError` for an update of another mask, `PrivacyError` where the
    budget does not bear the round.
    """
    mask = plan.spec(model.groups.layout).draw_mask()
    survivors, dense_size = mask.survivors, model.ref.dense_size
    ordered = sorted(accepted, key=lambda reply: reply.plan.client)
    found: list[Contribution] = []
    for reply in ordered:
        own = reply.plan
        if (own.mask_key, own.rank, own.drop_rate) != (plan.mask_key, plan.rank, plan.drop_rate):
            raise MergeError(
                f"client {own.client} has another mask; privacy needs one for all clients of a "
                "round: leave client_terms and upload_budget out"
            )
        found.append(contribution(reply.update, reply.dense, survivors))
    who = [names[reply.plan.client] for reply in ordered] if names else []
    made = run.release(plan.round, found, Places(mask, dense_size), who)
    values = made.mean[:survivors] * np.float32(settings.scaling)
    delta = mask.scatter(values, rescale=False)
    dense = made.mean[survivors:] if dense_size else None
    measured: dict[str, Any] = {
        "accepted": len(ordered),
        "weights": [1 / run.expected] * len(ordered),
        "survivors": [survivors] * len(ordered),
        "survivors_per_element": sum(reply.keep for reply in ordered),
        "merged_norm": norm_of(delta),
        "privacy": run.measured(made),
    }
    return MergedRound(delta, dense, tuple(measured["weights"]), measured)

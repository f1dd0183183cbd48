"""Plans of an asynchronous run, and what a buffer's updates can be merged by.

A plan's ``client`` is the number of its asking, which orders a buffer's updates; its ``round`` is
the merge that it would be in if no other came before, so that τ is the merge's number less it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from dare_agg.codec.budget import ClientTerms
from dare_agg.codec.derive import derive_key
from dare_agg.codec.mask import DropRate
from dare_agg.errors import ConfigError, refuse
from dare_agg.rounds.adapters import merge_products
from dare_agg.rounds.buffer import BufferSettings, Ticket
from dare_agg.rounds.chain import UpdateStep
from dare_agg.rounds.draws import round_secret
from dare_agg.rounds.plan import RoundPlan, make_plans
from dare_agg.rounds.settings import FederatedSettings
from dare_agg.rounds.terms import UpdateTerms
from dare_agg.vectors.layout import Layout
from dare_agg.vectors.model import ModelRef

_VALUES = "buffer-values"


def buffered_plan(
    secret: bytes,
    ticket: Ticket,
    terms: UpdateTerms,
    model: ModelRef,
    own: ClientTerms | None = None,
    *,
    run: str = "",
    shared_mask: bool = False,
    layout: Layout | None = None,
) -> RoundPlan:
    """The plan of a ticket over the version ``model``; ``secret`` is the run's.

    ``own`` are the client's own terms, whose drop rate the ticket was dealt for. Everything else is
    as in `make_plans`. Raises `ConfigError` where one mask for all would leave elements out for
    ever.
    """
    number = ticket.version + 1
    of_version = round_secret(secret, number)
    (plan,) = make_plans(
        of_version, number, [own], terms, model, run=run, shared_mask=shared_mask, layout=layout
    )
    rank, mask_key = ticket.rank, plan.mask_key
    if shared_mask:
        # One mask for the whole run, which must be of every element.
        if plan.drop_rate.p:
            raise ConfigError(
                f"client {ticket.client!r} has drop rate {plan.drop_rate} in a buffer whose "
                "updates are compared: give all clients drop_rate 0"
            )
        rank, mask_key = 0, derive_key(secret, "buffer-mask", *ticket.stride)
    elif ticket.apart:
        mask_key = derive_key(secret, "buffer-mask", *ticket.stride)
    elif terms.keep_rates == "uniform":
        family, rank = divmod(ticket.rank, ticket.stride[0] // ticket.stride[1])
        mask_key = derive_key(of_version, "mask", number, *ticket.stride, family)
    return replace(
        plan,
        client=ticket.number,
        mask_key=mask_key,
        rank=rank,
        values_key=derive_key(secret, _VALUES, ticket.number),
        dense_values_key=derive_key(secret, "buffer-dense-values", ticket.number),
    )


def is_of_run(plan: RoundPlan, secret: bytes) -> bool:
    """Whether a plan is of the run with this secret."""
    return plan.values_key == derive_key(secret, _VALUES, plan.client)


def has_ranks(settings: FederatedSettings) -> bool:
    """Whether updates are told apart by the ranks of their masks."""
    return settings.terms.keep_rates == "uniform" and not settings.shared_mask


def merged_masks(plans: Iterable[RoundPlan], number: int) -> list[RoundPlan]:
    """The masks of a buffer's updates as those of merge ``number``, for a downlink."""
    return [replace(plan, round=number) for plan in plans]


def check_buffered(
    settings: FederatedSettings,
    buffer: BufferSettings,
    *,
    drop_rate: DropRate | None = None,
    steps: Sequence[UpdateStep] = (),
) -> None:
    """Raise `ConfigError` for what updates of several versions cannot be merged by.

    ``drop_rate`` is None where the rounds choose it, among those that the rule bears.
    """
    terms, rule = settings.terms, settings.robust
    voted = rule is not None and rule.votes
    refusals = (
        (terms.directions, f"and method {settings.method!r}: clients send directions of their "
         "whole change, which staleness cannot weigh; merge by task-arithmetic, average or ties"),
        (terms.statistics, f"and method {settings.method!r}: its {terms.statistics} statistics "
         "are of models that were trained from one version; merge by task-arithmetic, average "
         "or ties"),
        (terms.keep_rates == "last", "and keep rates 'last', which are told anew with each "
         "version, so that masks of two versions overlap; set keep_rates 'uniform' or 'own'"),
        (voted and drop_rate is not None and drop_rate.p > 0,
         f"and robust = {str(rule)!r}, which compares the same elements of all clients: plans of "
         "a buffer were drawn over several versions and have no mask in common; set drop_rate 0 "
         "(values 'b1' make it a bit a value), or a rule that only bounds, such as norm-bound"),
        (merge_products in steps, "and merge_products: products of adapters that were trained "
         "from several versions have no one version to be told from; merge their factors"),
    )  # fmt: skip
    refuse(refusals, f"buffer = {buffer.size}")
    if rule is not None:
        rule.check_clients(buffer.size, "raise buffer")

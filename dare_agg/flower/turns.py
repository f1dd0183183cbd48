"""One client's turn in a round: what it was asked, from what version, and how it answers.

`dare_mod` opens a turn around the app's code. Code that trains arrays does not see it; code that
holds a model (`dare_agg.torch`) takes the version from it and answers in the mod's stead.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from flwr.app import Array, ConfigRecord, Context, Message, MetricRecord, RecordDict

from dare_agg.downlink.protocol import Receiver
from dare_agg.errors import DareError, UpdateError
from dare_agg.flower.app_records import Record, changed_integers, keep_local, kept_local
from dare_agg.flower.records import REPLY_KEY, STATISTICS_KEY
from dare_agg.flower.update_answer import update_answer
from dare_agg.rounds.client import ClientUpdate, model_of_plan
from dare_agg.rounds.messages import Held, Order, Refusal
from dare_agg.rounds.plan import RoundPlan
from dare_agg.vectors.model import Arrays, GlobalModel, global_model

LOG = logging.getLogger("flwr")
Number = int | float | list[int] | list[float]
_OPEN: ContextVar[Turn | None] = ContextVar("dare-agg turn", default=None)


@dataclass
class Turn:
    """What a client was asked, and the version that it was brought to.

    ``arrays`` are the version's by name. ``failed`` is the error that code which took the turn met.
    """

    message: Message
    order: Order
    receiver: Receiver
    arrays: Mapping[str, Array]
    context: Context
    failed: DareError | None = field(default=None)

    def version(self) -> GlobalModel:
        """The version as the global model: where it lies on disk, or of the arrays, in memory.

        Raises `LayoutError` or `BaseMismatchError` where it is not what the plan names.
        """
        return self.receiver.followed() or model_of_arrays(self.order, self.arrays)

    def own_tensors(self) -> Arrays:
        """This client's own tensors (heads), as its last round left them."""
        return {name: array.numpy() for name, array in kept_local(self.context).items()}

    def keep_own(self, tensors: Arrays, version: GlobalModel) -> None:
        """Keep this client's own tensors, as training left them, for its next round."""
        exclude = self.order.exclude
        warn_of_integers(changed_integers(tensors, exclude, version.local, tensors))
        keep_local(tensors, exclude, tensors, self.context)

    def answer(
        self,
        update: ClientUpdate | None,
        metrics: Mapping[str, Number],
        records: Mapping[str, ConfigRecord | MetricRecord] | None = None,
    ) -> Message:
        """The answer: an update where one was asked for, metrics, the app's own records."""
        own: dict[str, Record] = {**(records or {}), "metrics": MetricRecord(dict(metrics))}
        have = self.receiver.have()
        if update is None:
            content = RecordDict({**own, REPLY_KEY: ConfigRecord(Held(have=have).to_record())})
        else:
            content = update_answer(update, self.order, own, have, self.context)
        return Message(content, reply_to=self.message)

    def refuse(self, error: DareError) -> Message:
        """The answer that says why there is no update."""
        refusal = Refusal.of(error, self.receiver.have())
        return Message(
            RecordDict({REPLY_KEY: ConfigRecord(refusal.to_record())}), reply_to=self.message
        )

    @contextmanager
    def opened(self) -> Iterator[Turn]:
        """Let the app's code take this turn (`open_turn`) while the context lasts."""
        token = _OPEN.set(self)
        try:
            yield self
        finally:
            _OPEN.reset(token)


def open_turn() -> Turn | None:
    """The turn that `dare_mod` opened around the code that asks; None outside of one."""
    return _OPEN.get()


def is_answered(content: RecordDict) -> bool:
    """Whether code that took the turn answered it already."""
    return REPLY_KEY in content


def model_of_arrays(order: Order, arrays: Mapping[str, Array]) -> GlobalModel:
    """The version that arrays are, in the order's groups; raises as `Turn.version`."""
    named = {name: array.numpy() for name, array in arrays.items()}
    by_form, apart = order.by_form, order.apart
    if order.plan is not None:
        return model_of_plan(order.plan, named, by_form=by_form, apart=apart)
    return global_model(
        named, dense=order.dense, exclude=order.exclude, by_form=by_form, apart=apart
    )


def missing_statistics(plan: RoundPlan) -> UpdateError:
    """The refusal of training that returned no statistics where the server merges by them."""
    return UpdateError(
        f"the server merges by {plan.terms.statistics} values, the training code returned "
        f"none; return them as an ArrayRecord under {STATISTICS_KEY!r}",
        reason="statistics",
    )


@functools.cache
def warn_of_integers(names: tuple[str, ...]) -> None:
    """Say once in a process which integers do not reach the global model."""
    if names:
        LOG.warning(
            "training changed %d integer tensors (%r, …) that stay with this client, and the "
            "global model keeps its first values: name them in 'dense' to have them averaged "
            "(integers below 2**24), or in 'exclude' where each client's own are meant",
            len(names),
            names[0],
        )


@functools.cache
def warn_of_unmoved(names: tuple[str, ...], of: int) -> None:
    """Say once in a process which tensors get noise although training left them alone."""
    if 0 < len(names) < of:
        LOG.warning(
            "training left %d of %d tensors as they were (%r, …), and the noise of the value "
            "format reaches them with the others: name what is frozen in 'exclude', and it stays "
            "what it is",
            len(names),
            of,
            names[0],
        )

"""A client app that holds a model: the round's version in, an update out, no arrays between.

::

    app = ClientApp(mods=[dare_mod])

    @app.train()
    def train(msg, context):
        with federated_model(model, msg, context) as turn:   # the round's version is in the model
            trainer.train()                                  # the app's own loop
        return turn.reply(num_examples=len(data))            # encoded from the parameters
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, cast

from torch import nn

from dare_agg.errors import ConfigError, DareError
from dare_agg.rounds.statistics import Statistics
from dare_agg.torch.holding import hold
from dare_agg.torch.named import named_tensors
from dare_agg.torch.places import is_sharded
from dare_agg.torch.whole import whole_turn

if TYPE_CHECKING:
    from flwr.app import ConfigRecord, Context, Message, MetricRecord

    from dare_agg.flower.turns import Number, Turn


class FederatedTurn(Protocol):
    """What a model's app is given for a message."""

    def reply(
        self,
        num_examples: int,
        metrics: Mapping[str, Number] | None = None,
        *,
        records: Mapping[str, ConfigRecord | MetricRecord] | None = None,
        statistics: Statistics | None = None,
    ) -> Message:
        """The answer: what training changed, encoded from the parameters as they are now.

        After an evaluation nothing of the model travels. ``metrics`` stand beside
        "num-examples" in the record "metrics", ``records`` are the app's own; ``statistics`` are
        those that a merge by Fisher values or Gram matrices needs, by tensor. What cannot be sent
        (a NaN, tied weights that came apart) is answered by a refusal that says so.
        """


@contextmanager
def federated_model(
    model: nn.Module, msg: Message | None = None, context: Context | None = None
) -> Iterator[FederatedTurn]:
    """Load the version that a message is about into ``model``, in place; yield the turn.

    The model may be on any device, in float32, bfloat16 or float16, wrapped, a PEFT model (its
    adapter is federated), with tied weights. Under another strategy (FedAvg) and in secure sums
    the message's whole arrays are loaded, and the reply holds whole arrays.

    Of a model that `fully_shard` put in pieces, every process enters and replies; the first one
    has the message, the others give none and get no reply.

    Raises `LayoutError` where the model does not fit, which `dare_mod` answers with a refusal, and
    `ConfigError` without that mod.
    """
    from dare_agg.flower.records import is_order
    from dare_agg.flower.turns import open_turn

    del context  # the mod's turn has it
    turn = open_turn()
    if is_sharded(named_tensors(model).values()):
        from dare_agg.torch.ranks import all_ranks
        from dare_agg.torch.shared_turn import SharedTurn

        yield cast(FederatedTurn, SharedTurn(model, turn, all_ranks()))
        return
    if turn is None and (msg is None or is_order(msg)):
        raise ConfigError(
            "federated_model is called without a message, or without dare_mod around it; write "
            "ClientApp(mods=[dare_mod]), or @app.train(mods=[dare_mod])"
        )
    if turn is not None:
        yield _DareTurn(model, turn)
    elif msg is not None:
        yield whole_turn(model, msg)


class _DareTurn:
    """A turn that `dare_mod` opened, taken by a model in one process."""

    def __init__(self, model: nn.Module, turn: Turn) -> None:
        self._turn = turn
        try:
            self._held = hold(model, turn.version(), turn.own_tensors(), turn.order.exclude)
        except DareError as error:
            turn.failed = error
            raise

    def reply(
        self,
        num_examples: int,
        metrics: Mapping[str, Number] | None = None,
        *,
        records: Mapping[str, ConfigRecord | MetricRecord] | None = None,
        statistics: Statistics | None = None,
    ) -> Message:
        from dare_agg.flower.turns import missing_statistics

        plan, update = self._turn.order.plan, None
        if plan is not None:
            try:
                if plan.terms.statistics and statistics is None:
                    raise missing_statistics(plan)
                update = self._held.update(plan, statistics)
            except DareError as error:
                return self._turn.refuse(error)
            self._turn.keep_own(self._held.own_tensors(), self._held.start)
        said = {"num-examples": num_examples, **(metrics or {})}
        return self._turn.answer(update, said, records)

"""Flower's strategy for aggregation, DARE for transport: ``dare(FedYogi(...))``.

The strategy chooses the clients, writes their config and merges what comes back, as it does
alone. It is given each client's trained arrays, decoded when it looks at them, and what it
returns reaches the clients by the downlink. With ``drop_rate=0, values="f32"`` the result is its
own to rounding.
"""

from __future__ import annotations

import inspect
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedYogi, Result, Strategy

from dare_agg.codec.mask import parse_drop_rate
from dare_agg.errors import ConfigError, LayoutError, did_you_mean
from dare_agg.flower import run_log
from dare_agg.flower.app_records import with_content
from dare_agg.flower.clients import Client
from dare_agg.flower.open_round import OpenRound
from dare_agg.flower.replies import TrainReply
from dare_agg.flower.round_outcome import RoundOutcome, round_measurements
from dare_agg.flower.strategy import DareStrategy
from dare_agg.flower.transport import to_record
from dare_agg.flower.wrapped import MOST_ERROR, check_wrapped, compares
from dare_agg.rounds.auto import AUTO
from dare_agg.rounds.auto_state import AutoState
from dare_agg.rounds.noise import error_of
from dare_agg.rounds.plan import RoundPlan
from dare_agg.rounds.server import Rejection, round_weights

LOG = logging.getLogger("flwr")
# What the wrapped strategy is asked to do, through the methods it had when it was wrapped.
_STEPS = ("configure_train", "aggregate_train", "configure_evaluate", "aggregate_evaluate")
# Words of `DareStrategy` that say how to merge: the wrapped strategy's own to say.
_ARITHMETIC = (
    "method",
    "scaling",
    "options",
    "weighting",
    "server_step",
    "weight_bound",
    "steps",
    "robust",
    "byzantine",
    "privacy",
)
_ADAPTIVE = (FedAdagrad, FedAdam, FedYogi)
_UNLIKE = (
    "its records have other names than those of most clients, and Flower's strategies want them "
    "alike; return the same ArrayRecord and metrics everywhere"
)


def dare(strategy: Strategy, **words: Any) -> DareTransport:
    """Wrap one of Flower's strategies, or a subclass: it aggregates, DARE transports.

    ``words`` are those of `DareStrategy` about what travels and when: ``drop_rate``, ``values``,
    ``mask``, ``dense``, ``dense_values``, ``exclude``, ``seed``, ``deadline``, ``downlink``,
    ``identities``, ``upload_budget`` and so on. Clients need ``dare_mod``.

    Raises `ConfigError` for a strategy that cannot work on decoded updates, with the reason, and
    for words that say how to merge.
    """
    return DareTransport(strategy, **words)


class DareTransport(DareStrategy):
    """What `dare` makes. Attributes that it has not are the wrapped strategy's."""

    CALLED = "dare"

    def __init__(self, strategy: Strategy, **words: Any) -> None:
        check_wrapped(strategy)
        _check_words(words)
        self.strategy = strategy
        self._steps: Mapping[str, Callable[..., Any]] = {n: getattr(strategy, n) for n in _STEPS}
        named = ("weighted_by_key", "arrayrecord_key", "configrecord_key")
        own = {name: getattr(strategy, name) for name in named if hasattr(strategy, name)}
        super().__init__(**own, weight_bound=0, **words)
        self._check_own_start()
        own_terms, chooser = self._own_terms, self._own_terms.chooser
        if chooser is not None:
            chooser.compared = compares(strategy)
        if own_terms.upload_budget is None and own_terms.client_terms is None:
            terms = self.settings.terms
            error = error_of(terms.drop_rate, terms.values)
            if chooser is not None:
                values = "b4" if chooser.values == AUTO else chooser.values
                error = error_of(parse_drop_rate(0), values)
            _check_error(strategy, error)
        elif compares(strategy):
            raise ConfigError(
                f"{type(strategy).__name__} compares clients' updates, which upload_budget and "
                "client_terms make as unlike as their uplinks; leave these out"
            )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "strategy":
            raise AttributeError(name)
        return getattr(self.strategy, name)

    def summary(self) -> None:
        """Log what the wrapped strategy is set to, and what travels."""
        LOG.info("\t├── %s aggregates, DARE transports", type(self.strategy).__name__)
        run_log.updates(self.settings, self._own_terms.chooser is not None)
        LOG.info("\t├── Downlink: %s", self.downlink.name)
        self.strategy.summary()

    def start(
        self, grid: Grid, initial_arrays: ArrayRecord | None = None, *args: Any, **words: Any
    ) -> Result:
        """Run as `DareStrategy.start` does; by the wrapped strategy's own start if it has one."""
        if not self._has_own_start():
            if words.get("start_round", 1) > 1:
                LOG.warning(
                    "%s keeps what it knows of earlier rounds in memory alone: it begins anew",
                    type(self.strategy).__name__,
                )
            return super().start(grid, initial_arrays, *args, **words)
        arrays = self.begin(initial_arrays)
        for name in _STEPS:
            setattr(self.strategy, name, getattr(self, name))
        try:
            return self.strategy.start(grid, arrays, *args, **words)
        finally:
            for name in _STEPS:
                delattr(self.strategy, name)
            self.give_back()

    # --- train -----------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The wrapped strategy's messages, to be sent with the round's plans."""
        self._open = None
        if self.part():
            arrays = self.broadcasting.arrays
        self.broadcasting.adopt(arrays)
        self.train_config = config
        ready = self._ready(grid, server_round, "train")
        messages = list(
            self._steps["configure_train"](
                server_round, self.broadcasting.arrays, config, _Met(grid, ready)
            )
        )
        if messages:
            self._lend_round(self._opened_for(messages, server_round, arrays, grid), grid)
        return messages

    def _open_round(self, number: int, chosen: Sequence[Client]) -> OpenRound:
        opened = super()._open_round(number, chosen)
        for plan in opened.plans.values():
            _check_error(self.strategy, error_of(plan.drop_rate, plan.terms.values))
        return opened

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """What the wrapped strategy makes of the replies that count, and of the errors."""
        merge, given = self._steps["aggregate_train"], list(replies)
        opened = self._taken_up(given)
        if opened is None:
            arrays, metrics = merge(server_round, [])
            return arrays, metrics
        taken = self._alike(opened, opened.passed_on(given))
        rejections = opened.inbox.all_rejections()
        if len(taken) < self.min_replies:
            self.count_empty(opened.asked(), len(taken), rejections)
            return None, None
        self.broadcasting.have.update(opened.held)
        arrays, metrics = merge(server_round, [*_as_messages(taken, given), *_failures(given)])
        plans = [reply.accepted.plan for reply in taken]
        if arrays is None:
            why = f"round {server_round}: {type(self.strategy).__name__} merged nothing"
            measured = round_measurements(opened.asked(), taken, rejections, {})
            outcome = RoundOutcome(
                opened.number, opened.model, self.step_state, measured, rejections, plans, metrics
            )
            self.stay(outcome, why, reason="merge")
            return None, metrics
        self._go_on(arrays)
        measured = round_measurements(opened.asked(), taken, rejections, {})
        auto = self._auto_after(opened, taken, plans, measured)
        run_log.merged(opened.asked(), taken)
        outcome = RoundOutcome(
            opened.number,
            self.broadcasting.model,
            replace(self.step_state, auto=auto),
            measured,
            rejections,
            plans,
            metrics,
        )
        return self.move(outcome), metrics

    def _alike(self, opened: OpenRound, replies: Sequence[TrainReply]) -> list[TrainReply]:
        """The replies whose records are like those of most: Flower's strategies raise otherwise."""
        odd = _odd_ones([reply.content for reply in replies])
        for place in odd:
            client = replies[place].accepted.plan.client
            opened.inbox.reject(replies[place].node, Rejection(client, "malformed", _UNLIKE))
        return [reply for place, reply in enumerate(replies) if place not in odd]

    def _go_on(self, arrays: ArrayRecord) -> None:
        """Bring what was merged to the version that clients will hold."""
        model = self.broadcasting.model
        dtypes, local, counted = model.groups.dtypes, model.local, model.groups.integers
        if set(arrays) != set(dtypes):
            raise LayoutError(
                f"{type(self.strategy).__name__} returned {len(arrays)} tensors, the global model "
                f"has {len(dtypes)}; return all of them, by their names"
            )
        # Flower's arithmetic may end in float64; tensors that are each client's own stay.
        floats = {n: dtype for n, dtype in dtypes.items() if n not in local and n not in counted}
        named = {name: arrays[name].numpy().astype(dtype) for name, dtype in floats.items()}
        own = to_record({n: np.asarray(a) for n, a in {**named, **local}.items()})
        self.broadcasting.follow(ArrayRecord({n: own.get(n, arrays[n]) for n in dtypes}))
        for name, kept in list(vars(self.strategy).items()):
            if kept is arrays:  # FedAvgM goes on from what it returned
                setattr(self.strategy, name, self.broadcasting.arrays)

    def _auto_after(
        self,
        opened: OpenRound,
        taken: Sequence[TrainReply],
        plans: Sequence[RoundPlan],
        measured: dict[str, Any],
    ) -> AutoState:
        """Judge the noise of the drop where the strategy takes a mean as it is."""
        if isinstance(self.strategy, _ADAPTIVE) or not isinstance(self.strategy, FedAvg):
            measured["noise"] = measured["noise_of_change"] = None
            return self.step_state.auto
        weights = round_weights([reply.accepted for reply in taken], self.settings.weighting)
        moved = self.broadcasting.model
        return self._noise.look(measured, plans, weights, opened.model, moved, self.step_state.auto)

    # --- evaluate --------------------------------------------------------------------------

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The wrapped strategy's messages, with the newest version by the downlink."""
        self.broadcasting.adopt(arrays)
        ready = self._ready(grid, server_round, "evaluate")
        messages = list(
            self._steps["configure_evaluate"](
                server_round, self.broadcasting.arrays, config, _Met(grid, ready)
            )
        )
        clients = {client.node: client for client in ready}
        self.evaluation.nbytes, self.evaluation.told = 0, {}
        ours = [self.evaluation.ready(clients, message) for message in messages]
        self._lend_evaluation(ours, grid)
        return ours

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """What the wrapped strategy makes of the clients' metrics."""
        self.give_back()
        given = list(replies)
        good = [reply for reply in given if not reply.has_error()]
        odd = _odd_ones([reply.content for reply in good])
        for place in odd:
            node = good[place].metadata.src_node_id
            LOG.warning("evaluation of node %d left out: %s", node, _UNLIKE)
        left_out = [good[place] for place in odd]
        kept = [reply for reply in given if not any(reply is other for other in left_out)]
        metrics: MetricRecord | None = self._steps["aggregate_evaluate"](server_round, kept)
        self.tell_elsewhere(metrics)
        return metrics

    # --- the wrapped strategy --------------------------------------------------------------

    def _ready(self, grid: Grid, number: int, what: str) -> list[Client]:
        """The clients that take part, once there are as many as the strategy waits for."""
        if getattr(self.strategy, f"fraction_{what}", 1.0) == 0:
            return []
        words = ("min_available_nodes", f"min_{what}_nodes")
        least = max(int(getattr(self.strategy, word, 1)) for word in words)
        return self.meet(grid, number, max(least, 1))

    def _has_own_start(self) -> bool:
        return type(self.strategy).start is not Strategy.start

    def _check_own_start(self) -> None:
        if self._has_own_start() and self.round_hook is not None:
            raise ConfigError(
                f"{type(self.strategy).__name__} has a start of its own, which ends when it does "
                "and not by round_hook; put what the hook does into that start"
            )


class _Met:
    """A grid on which only clients that take part are online."""

    def __init__(self, grid: Grid, ready: Sequence[Client]) -> None:
        self._grid, self._ready = grid, ready

    def get_node_ids(self) -> list[int]:
        return [client.node for client in self._ready]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)


def _as_messages(taken: Sequence[TrainReply], given: Sequence[Message]) -> list[Message]:
    """The replies that count, one for each client, in their order."""
    found: dict[int, Message] = {}
    for message in given:
        if not message.has_error():
            found.setdefault(message.metadata.src_node_id, message)
    return [with_content(found[reply.node], reply.content) for reply in taken]


def _odd_ones(contents: Sequence[RecordDict]) -> set[int]:
    """Places of contents whose records have other names or kinds than those of most."""
    forms = [_form(content) for content in contents]
    usual = max(forms, key=Counter(forms).__getitem__, default=None)
    return {place for place, form in enumerate(forms) if form != usual}


def _form(content: RecordDict) -> frozenset[object]:
    """What Flower's strategies want alike: the arrays' record, the metrics and their lengths."""
    metrics = {
        (name, key, len(value) if isinstance(value, list) else -1)
        for name, record in content.metric_records.items()
        for key, value in record.items()
    }
    return frozenset([*content.array_records, *metrics])


def _failures(given: Sequence[Message]) -> list[Message]:
    return [message for message in given if message.has_error()]


def _check_error(strategy: Strategy, error: float) -> None:
    """Refuse noise that a strategy would take for what clients learnt."""
    if error > MOST_ERROR and compares(strategy):
        raise ConfigError(
            f"{type(strategy).__name__} compares clients' updates with each other, and what is "
            f"dropped or rounded away differs from client to client (error {error:.2g} of each, at "
            f'most {MOST_ERROR:g} is allowed); give dare() drop_rate=0, values="b4"'
        )


def _check_words(words: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for a word that `dare` has no use for."""
    every = inspect.signature(DareStrategy.__init__).parameters
    fedavg = inspect.signature(FedAvg.__init__).parameters
    known = [name for name in every if name not in fedavg and name not in _ARITHMETIC]
    for word in words:
        if word == "buffer":
            raise ConfigError(
                "buffer is DareStrategy's own: Flower's strategies aggregate rounds, whose updates "
                "are all of one version; give DareStrategy(buffer=…), or leave it out"
            )
        if word in fedavg or word in _ARITHMETIC:
            raise ConfigError(
                f"{word} is the wrapped strategy's own to say; dare() says what travels: leave it "
                "out here"
            )
        if word not in known:
            raise ConfigError(f"dare() has no word {word!r}{did_you_mean(word, known)}")


__all__ = ["DareTransport", "dare"]

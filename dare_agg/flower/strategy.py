"""`DareStrategy`: Flower's FedAvg with compact updates, a merge method and a server step."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid

from dare_agg.codec.budget import ClientTerms, UploadBudget
from dare_agg.codec.derive import derive_key
from dare_agg.codec.mask import DropRate, parse_drop_rate
from dare_agg.downlink.protocol import Downlink
from dare_agg.errors import ConfigError, PrivacyError, StateError
from dare_agg.flower import run_log
from dare_agg.flower.budgets import RELEASES
from dare_agg.flower.buffer_state import BUFFER, NOTHING_MERGED
from dare_agg.flower.buffered import BufferedRounds, buffered_rounds
from dare_agg.flower.clients import Client, sample
from dare_agg.flower.differential_privacy import check_privacy, privacy_wrapper
from dare_agg.flower.limits import OWN_BYTES
from dare_agg.flower.merging import merge_passed
from dare_agg.flower.metrics import MetricsFn, aggregate_metrics, mean_metrics
from dare_agg.flower.open_round import OpenRound
from dare_agg.flower.private_rounds import PrivateRounds
from dare_agg.flower.receiving import Lent
from dare_agg.flower.replies import Inbox, TrainReply
from dare_agg.flower.round_outcome import Asked, RoundOutcome, round_measurements
from dare_agg.flower.round_strategy import ROUND_WORD, RoundStrategy
from dare_agg.privacy.clients import ClientPrivacy
from dare_agg.robust.rule import check_robust
from dare_agg.rounds import arguments
from dare_agg.rounds.auto import AUTO
from dare_agg.rounds.buffer import BufferSettings
from dare_agg.rounds.buffered import merged_masks
from dare_agg.rounds.chain import Passed, StepContext, UpdateStep, chain
from dare_agg.rounds.choosing import Chooser
from dare_agg.rounds.directions import linears_of_round
from dare_agg.rounds.draws import round_secret
from dare_agg.rounds.messages import ASK_TRAIN, Hello
from dare_agg.rounds.own_terms import OwnTerms
from dare_agg.rounds.plan import make_plans
from dare_agg.rounds.robust import check_one_mask, robust_step
from dare_agg.rounds.round_noise import RoundNoise
from dare_agg.rounds.server import Accepted, Rejection, round_weights
from dare_agg.rounds.settings import FederatedSettings
from dare_agg.rounds.staleness import staleness_step
from dare_agg.rounds.step import ServerStep
from dare_agg.rounds.terms import UpdateTerms
from dare_agg.rounds.weight_bound import bound_step, bound_weights

LOG = logging.getLogger("flwr")


class DareStrategy(RoundStrategy):
    """Federated fine-tuning with DARE updates; a drop-in for Flower's FedAvg.

    The words of FedAvg mean what they mean there. The others:

    Parameters
    ----------
    method, scaling, options
        merge method ("task-arithmetic", "ties", "average", "fisher", "regmean", "wudi"), λ, and
        the method's own options. For Fisher and RegMean the training code must return statistics
        (``dare_agg.flower.STATISTICS_KEY``).
    drop_rate, values
        of the clients' updates. "auto" has each round choose what the model bears: small models
        send every value in a few bits, large ones begin with a drop of 0.9 in one bit
        (`dare_agg.rounds.auto`). With a drop rate, ``values`` are "b1" unless said.
    mask
        "stratified" or "bernoulli".
    keep_rates
        "uniform" keeps the same share of every tensor; "own" and "last" keep it in proportion to
        the tensor's change, as each client finds it or as it was in the round before, in as many
        bytes.
    dense, dense_values
        patterns of tensors that travel whole, and their value format.
    directions, direction_bits
        for "wudi": leading directions of each Linear's change that travel beside the survivors (0:
        8), and bits of an element.
    exclude
        patterns of tensors that never leave a client.
    weighting
        "examples" (``weighted_by_key`` of each reply) or "equal".
    server_step
        a row of `SERVER_STEPS`, with numbers as in "adam(tau=1e-4)", or made.
    max_weight
        largest number of examples or tokens a client may claim (2^53); what bounds a
        client's share of the model is ``weight_bound``.
    weight_bound
        no client counts for more than so many times the round's median (0: no bound).
    seed
        makes masks, keys and samples the same in every run; None draws a secret.
    deadline
        seconds after which a round closes with the replies that are there.
    node_timeout
        seconds to wait for enough clients to be online.
    min_replies
        fewest accepted updates a round needs; below, the model stays as it is.
    max_empty_rounds
        how many rounds in a row may miss ``min_replies`` before the run fails. None: any
        number, as in FedAvg; a run in which all miss fails in any case.
    client_terms
        gives a client (by its `Hello`) its own drop rate and value format.
    upload_budget
        most bytes (and seconds, by a node's own uplink) of a client's upload a round. Beside a
        drop rate it chooses rate and format of each client instead, the finest that fit.
    identities
        public keys (hex) of the clients by name; their replies must be signed.
    downlink
        how the model reaches the clients; the full arrays unless given.
    base, state
        a checkpoint (folder, file, or name on the hub) that the run begins with where it
        lies, and the folder in which its versions are kept: for models of any size, of which
        no whole one is in memory or travels. ``start`` is then given no arrays.
    verify_every
        every so many rounds clients compare all values of the version with the server's by
        its fingerprint (0: never; versions are named by their chain of steps).
    send_base
        send the base, in pieces, to clients that have it nowhere.
    reply_room
        most bytes of the app's own records in a reply, metrics and others (1 MiB).
    steps
        what stands between checking and merging, in order (`dare_agg.rounds.chain`).
    robust, byzantine
        the rule that bears so many Byzantine clients a round, last of the steps
        (docs/ROBUST.md); the clients of a round then share one mask and one drop rate.
    privacy
        what clients are promised (`ClientPrivacy`): a round releases the clipped and noised
        sum of all their updates, ``fraction_train`` is the probability with which a client takes
        part (with ``apart`` the share that is asked), and the run ends when its budget is spent.
    buffer
        how many updates make a merge that waits for nobody (0: rounds; docs/ASYNC.md), or
        `dare_agg.rounds.buffer.BufferSettings`. A round of the loop is then a merge, and
        ``deadline`` the seconds that a client has.
    round_hook
        called with each `RoundOutcome`; returning True ends the run early.
    """

    # What its words are given to, for messages.
    CALLED = "DareStrategy"

    def __init__(
        self,
        fraction_train: float = 1.0,
        fraction_evaluate: float = 1.0,
        min_train_nodes: int = 2,
        min_evaluate_nodes: int = 2,
        min_available_nodes: int = 2,
        weighted_by_key: str = "num-examples",
        arrayrecord_key: str = "arrays",
        configrecord_key: str = "config",
        train_metrics_aggr_fn: MetricsFn | None = None,
        evaluate_metrics_aggr_fn: MetricsFn | None = None,
        *,
        method: str = FederatedSettings.method,
        scaling: float = FederatedSettings.scaling,
        drop_rate: DropRate | float | str = AUTO,
        values: str = AUTO,
        mask: str = UpdateTerms.mask,
        keep_rates: str = UpdateTerms.keep_rates,
        directions: int = UpdateTerms.directions,
        direction_bits: int = UpdateTerms.direction_bits,
        dense: Sequence[str] = UpdateTerms.dense,
        exclude: Sequence[str] = UpdateTerms.exclude,
        dense_values: str = UpdateTerms.dense_values,
        weighting: str = FederatedSettings.weighting,
        server_step: str | ServerStep = "plain",
        options: Mapping[str, Any] | None = None,
        max_weight: float = UpdateTerms.max_weight,
        weight_bound: float = FederatedSettings.weight_bound,
        threads: int = FederatedSettings.threads,
        seed: int | None = None,
        run: str = "",
        deadline: float | None = None,
        node_timeout: float = 600.0,
        min_replies: int = 1,
        max_empty_rounds: int | None = None,
        client_terms: Callable[[Hello], ClientTerms | None] | None = None,
        upload_budget: UploadBudget | None = None,
        identities: Mapping[str, str] | None = None,
        downlink: Downlink | None = None,
        base: str | os.PathLike[str] | None = None,
        state: str | os.PathLike[str] | None = None,
        verify_every: int = 0,
        send_base: bool = False,
        steps: Sequence[UpdateStep] = (),
        robust: str = "",
        byzantine: int = 0,
        privacy: ClientPrivacy | None = None,
        reply_room: int = OWN_BYTES,
        buffer: int | BufferSettings = 0,
        round_hook: Callable[[RoundOutcome], bool | None] | None = None,
    ) -> None:
        chosen = drop_rate == AUTO
        settings = FederatedSettings(
            UpdateTerms(
                drop_rate=UpdateTerms.drop_rate if chosen else parse_drop_rate(drop_rate),
                values=UpdateTerms.values if values == AUTO else values,
                mask=mask,
                dense=dense,  # type: ignore[arg-type]
                exclude=exclude,  # type: ignore[arg-type]
                dense_values=dense_values,
                keep_rates=keep_rates,
                directions=directions,
                direction_bits=direction_bits,
                max_weight=max_weight,
            ),
            method=method,
            scaling=scaling,
            options=dict(options or {}),
            weighting=weighting,
            weight_bound=weight_bound,
            server_step=arguments.as_step(server_step),
            threads=threads,
            robust=check_robust(robust, byzantine),
            shared_mask=privacy is not None,
        )
        super().__init__(
            settings,
            fraction_train=fraction_train,
            fraction_evaluate=fraction_evaluate,
            min_train_nodes=min_train_nodes,
            min_evaluate_nodes=min_evaluate_nodes,
            min_available_nodes=min_available_nodes,
            weighted_by_key=weighted_by_key,
            arrayrecord_key=arrayrecord_key,
            configrecord_key=configrecord_key,
            evaluate_metrics_aggr_fn=evaluate_metrics_aggr_fn,
            seed=seed,
            run=run,
            deadline=deadline,
            node_timeout=node_timeout,
            max_empty_rounds=max_empty_rounds,
            identities=identities,
            downlink=downlink,
            base=base,
            state=state,
            verify_every=verify_every,
            send_base=send_base,
            reply_room=reply_room,
            round_hook=round_hook,
        )
        self.train_metrics_aggr_fn = train_metrics_aggr_fn or mean_metrics
        self.min_replies = arguments.count("min_replies", min_replies, least=1)
        self.buffered: BufferedRounds | None = None
        if buffer or isinstance(buffer, bool):
            self._check_own_rounds()
            self.buffered = buffered_rounds(self, buffer, steps, privacy, chosen=chosen)
        first = () if self.buffered is None else (staleness_step(self.buffered.settings.rule),)
        self.steps = chain(*first, bound_step, *steps, *self._robust_steps())
        chooser = Chooser(self.CALLED, LOG, values) if chosen else None
        if chooser is not None and self.buffered is not None:
            # What a rule compares are the same elements of all: in a buffer, all of them.
            chooser.compared = settings.shared_mask
        self._own_terms = OwnTerms(client_terms, upload_budget, chooser)
        self._noise = RoundNoise(
            self.CALLED,
            LOG,
            settings,
            self._own_terms,
            self.store,
            lambda: privacy_wrapper() is not None,
        )
        self._open: OpenRound | None = None
        self.private: PrivateRounds | None = None
        if privacy is not None:
            others = {
                "steps": steps, "client_terms": client_terms, "upload_budget": upload_budget,
                "base": base, "robust": robust,
                "drop_rate='auto' (set one: its choice shows norms)": chooser,
            }  # fmt: skip
            self.private = PrivateRounds(privacy, settings, self.fraction_train, others)
            self.standing.names = False

    def _check_own_rounds(self) -> None:
        """Refuse a buffer where a subclass has rounds of its own."""
        for name in ("configure_train", "aggregate_train"):
            if getattr(type(self), name) is not getattr(DareStrategy, name):
                raise ConfigError(
                    f"buffer with {type(self).__name__}, which overrides {name}: a buffer has no "
                    "rounds whose messages are configured; give what it does as steps"
                )

    def _robust_steps(self) -> tuple[UpdateStep, ...]:
        """The robust rule as a step, where there is one and rounds have enough clients for it."""
        rule = self.settings.robust
        if rule is None:
            return ()
        fewest = max(int(self.min_available_nodes * self.fraction_train), self.min_train_nodes)
        if self.buffered is not None:
            fewest = self.buffered.settings.size
        rule.check_clients(fewest, "raise min_available_nodes (min-clients) or fraction_train")
        if rule.beta and self.store is not None:
            raise ConfigError(
                f"robust = {str(rule)!r} with a base on disk: momentum keeps a whole model for "
                "every client; leave momentum out"
            )
        self.min_replies = max(self.min_replies, rule.least)
        return (robust_step(rule),)

    def summary(self) -> None:
        """Log what the run is set to."""
        settings = self.settings
        super().summary()
        run_log.updates(settings, self._own_terms.chooser is not None)
        LOG.info(
            "\t└── Merge: %s, scaling %g, weights by %s, server step %s %s; downlink %s",
            settings.method,
            settings.scaling,
            settings.weighting,
            settings.server_step.name,
            dict(settings.server_step.numbers),
            self.downlink.name,
        )

    def ready_for(self, rounds: int) -> None:
        """Open the privacy budget, if the run has one."""
        if self.private is not None:
            self.private.begin(rounds)

    def may_go_on(self, number: int, first: bool) -> bool:
        """Whether the privacy budget bears the round; raises `PrivacyError` for the first."""
        return self.private is None or self.private.may_go_on(number, first)

    def ended(self) -> None:
        """Leave the clients of a buffer that train."""
        if self.buffered is not None:
            self.buffered.close()

    def kept_facts(self) -> dict[str, Any]:
        """How many releases there were, where privacy is kept, and what a buffer is after it."""
        if self.buffered is not None:
            return self.buffered.facts()
        return {} if self.private is None else self.private.facts()

    def take_up_begun(self) -> None:
        """Go on with a run that was begun: with the updates that it accepted before a merge."""
        if self.buffered is not None:
            self.buffered.take_up(NOTHING_MERGED)

    def take_up(self, facts: Mapping[str, Any]) -> None:
        """Go on from a state; raises `PrivacyError` where it was of another privacy.

        And `StateError` for one of a run with a buffer without one, or the other way round.
        """
        if self.buffered is not None:
            self.buffered.take_up(facts.get(BUFFER))
        elif BUFFER in facts:
            raise StateError(
                "the run was begun with a buffer, and is to go on without; give the strategy the "
                "same buffer, or begin another run"
            )
        if self.private is not None:
            self.private.take_up(facts)
        elif RELEASES in facts:
            raise PrivacyError(
                "the run was begun with privacy of its clients, and is to go on without; give the "
                "strategy the same privacy, or begin another run"
            )

    def choose(self, grid: Grid, what: str, number: int) -> list[Client]:
        """As every strategy; where privacy is kept each client is drawn by itself to train.

        With a buffer, those evaluate who do not train.
        """
        if self.buffered is not None:
            idle = self.buffered.idle(grid)
            count = max(int(len(idle) * self.fraction_evaluate), self.min_evaluate_nodes, 1)
            return sample(idle, count, derive_key(self.secret, what, length=32), number)
        if self.private is None or what != ASK_TRAIN:
            return super().choose(grid, what, number)
        least = max(self.min_available_nodes, self.min_train_nodes, 1)
        return self.private.drawn(number, self.meet(grid, number, least))

    def train_round(
        self, number: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid, limit: float
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Ask those that `configure_train` chose, and merge what `aggregate_train` makes of it."""
        if self.buffered is not None:
            return self.buffered.train_round(number, config, grid, limit)
        self._open = None
        messages = list(self.configure_train(number, arrays, config, grid))
        if not messages:
            if self.private is None:  # else noise alone is released
                self._open = None
            return self.aggregate_train(number, [])
        opened = self._opened_for(messages, number, arrays, grid)
        self.give_back()
        replies = opened.receive(grid, messages, limit)
        if self.part():
            LOG.info("round %d: the clients are asked once more", number)
            return self.train_round(number, self.broadcasting.arrays, config, grid, limit)
        merged, metrics = self.aggregate_train(number, replies)
        if self._open is not None:
            self._note_merged_elsewhere(self._open, merged is not None)
        return merged, metrics

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Sample clients, make their plans and messages."""
        if self.buffered is not None:
            raise ConfigError(
                "a buffer has no rounds whose messages are configured, as a loop of one's own and "
                "wrappers around the strategy want them: call its start, or leave buffer out"
            )
        self._open = None
        if self.fraction_train == 0.0:
            return []
        if self.part():
            arrays = self.broadcasting.arrays
        self.broadcasting.adopt(arrays)
        chosen = self.choose(grid, ASK_TRAIN, server_round)
        self._open = opened = self._open_round(server_round, chosen)
        config[ROUND_WORD] = server_round
        if self.settings.terms.statistics:
            config["statistics"] = self.settings.terms.statistics
        messages = [opened.message(client, config) for client in chosen]
        self._lend_round(opened, grid)
        return messages

    def _lend_round(self, opened: OpenRound, grid: Grid) -> None:
        """Have the round's messages sent and answered as here, whoever wrote the loop."""

        def ready(message: Message) -> Message | None:
            return opened.ready(message) if opened.is_ours(message) else None

        self.lend(Lent(grid, ready, opened.take, opened.room, self.deadline))

    def part(self) -> bool:
        """Keep apart the tied tensors that clients found apart; returns whether there were any."""
        before = self.broadcasting.part()
        if before is not None:
            self.relay(before)
        return before is not None

    def _open_round(self, number: int, chosen: Sequence[Client]) -> OpenRound:
        """A round of these clients, with a plan for each."""
        model = self.broadcasting.model
        terms = self.settings.terms
        own = [self.own_terms(client.hello) for client in chosen]
        if terms.directions:
            linears_of_round(model.groups.layout)
        plans = make_plans(
            round_secret(self.secret, number),
            number,
            own or ([None] if self.private else []),
            terms,
            model.ref,
            run=self.run,
            shared_mask=self.settings.shared_mask,
            layout=model.groups.layout,
            levels=self.step_state.levels,
        )
        if self.settings.robust is not None and self.settings.robust.votes:
            check_one_mask(plans)
        check_privacy(self.train_config, self.settings, self.downlink, plans, model.groups)
        if self.private is not None:
            self.private.open(model, plans[0], chosen)
        by_node = {c.node: plan for c, plan in zip(chosen, plans[: len(chosen)], strict=True)}
        inbox = Inbox(
            by_node,
            self.weighted_by_key,
            self.settings.weighting,
            signers=self.signers(chosen),
            layout=model.groups.layout,
        )
        return OpenRound(
            number,
            list(chosen),
            by_node,
            inbox,
            self.broadcasting,
            self.standing,
            self.reply_room,
        )

    def own_terms(self, hello: Hello) -> ClientTerms | None:
        """The terms of one client now, None for those of all."""
        terms, auto = self.settings.terms, self.step_state.auto
        return self._own_terms.of(hello, self.broadcasting.model, terms, auto)

    def signers(self, clients: Sequence[Client]) -> dict[int, tuple[str, str]]:
        """The name and key by which each node's answer must be signed; none without identities."""
        return {
            client.node: (client.hello.name, self.identities[client.hello.name])
            for client in clients
            if self.identities
        }

    def _opened_for(
        self, messages: Sequence[Message], number: int, arrays: ArrayRecord, grid: Grid
    ) -> OpenRound:
        """The open round; made here where an override of configure_train chose by itself."""
        nodes = {message.metadata.dst_node_id for message in messages}
        if self._open is None or not nodes <= set(self._open.plans):
            self.broadcasting.adopt(arrays)
            ready = self.meet(grid, number, len(nodes))
            chosen = [client for client in ready if client.node in nodes]
            if strange := nodes - {client.node for client in chosen}:
                raise ConfigError(
                    f"configure_train asks node {min(strange)}, which is not online or does not "
                    "take part; ask those of super().configure_train"
                )
            self._open = self._open_round(number, chosen)
        return self._open

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Merge what is passed on of a round's replies.

        Each is a client's arrays, decoded when they are looked at, beside its own records, or an
        error. Of those that were not changed the update itself is merged. Raises `ConfigError`
        for replies where no round is open.
        """
        given = list(replies)
        opened = self._taken_up(given)
        if opened is None:
            return None, None
        every = opened.passed_on(given)
        return self.merge(opened.asked(), every, opened.inbox.all_rejections(), opened.held)

    def merge(
        self,
        asked: Asked,
        every: Sequence[TrainReply],
        rejected: Sequence[Rejection],
        held: Mapping[int, str],
        *,
        number: int = 0,
        told: Mapping[str, Any] | None = None,
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Merge replies that answer their plans, in the order of clients, and go on from there.

        ``held`` are the versions that nodes hold after it. Of a buffer, ``number`` is the merge's,
        and ``told`` what is measured of it besides how old its updates are.
        """
        passed = self._pass_steps(
            number or asked.round, [reply.accepted for reply in every], asked.names
        )
        rejections = [*rejected, *passed.rejections]
        lost = {rejection.client for rejection in passed.rejections}
        taken = [reply for reply in every if reply.accepted.plan.client not in lost]
        if len(taken) < self.min_replies and self.private is None:
            self.count_empty(asked, len(taken), rejections)
            return None, None
        model = self.broadcasting.model
        plans = [reply.accepted.plan for reply in taken]
        moved = merge_passed(
            model,
            self.step_state,
            passed,
            self.settings,
            self.downlink,
            merged_masks(plans, number) if number else plans,
            store=self.store,
            private=self.private,
        )
        self.broadcasting.have.update(held)
        measurements = round_measurements(asked, taken, rejections, moved.measurements)
        if number:
            ages = [number - plan.round for plan in plans]
            measurements["buffer"] = {**(told or {}), "staleness": ages}
        run_log.weights_cut(measurements, self.settings.weight_bound)
        weights = round_weights(
            bound_weights([reply.accepted for reply in taken], self.settings),
            self.settings.weighting,
        )
        measurements["noise"] = measurements["noise_of_change"] = None
        step_state = moved.step_state
        if self.private is None:
            auto = self._noise.look(
                measurements,
                moved.plans,
                weights,
                model,
                moved.model,
                self.step_state.auto,
                moved.tensor_squares,
            )
            step_state = replace(step_state, auto=auto)
        metrics = None
        if taken:
            metrics = aggregate_metrics(
                self.train_metrics_aggr_fn,
                [reply.content for reply in taken],
                weights,
                self.weighted_by_key,
            )
        run_log.merged(asked, taken)
        outcome = RoundOutcome(
            asked.round,
            moved.model,
            step_state,
            measurements,
            rejections,
            moved.plans,
            metrics,
        )
        return self.move(outcome), metrics

    def _taken_up(self, given: Sequence[Message]) -> OpenRound | None:
        """The round that these replies are of; it is open no more."""
        opened, self._open = self._open, None
        self.give_back()
        if opened is None and given:
            raise ConfigError(
                "aggregate_train was given replies, and no round is open: configure_train comes "
                "first, and one aggregate_train for each"
            )
        return opened

    def _note_merged_elsewhere(self, opened: OpenRound, moved: bool) -> None:
        """An override of aggregate_train merged by itself: what is known of the round is kept."""
        self._open = None
        taken, rejections = opened.inbox.in_order(), opened.inbox.all_rejections()
        self.broadcasting.have.update({one.node: one.receipt.have for one in taken})
        if moved:
            self._tally.move()
        self.outcome = RoundOutcome(
            opened.number,
            opened.model,
            self.step_state,
            round_measurements(opened.asked(), taken, rejections, {}),
            rejections,
            [reply.accepted.plan for reply in taken],
        )

    def _pass_steps(
        self, number: int, accepted: Sequence[Accepted], names: Mapping[int, str]
    ) -> Passed:
        """What the steps before the merge let through; their draws are no client's to know."""
        secret = round_secret(self.secret, number)
        key = derive_key(secret, "steps", length=32)
        context = StepContext(
            self.broadcasting.model, self.settings, number, key, names, self.step_state.momenta
        )
        passed = self.steps(accepted, context)
        for one in passed.rejections:
            LOG.warning("rejected client %d: %s: %s", one.client, one.reason, one.detail)
        return passed

    def count_empty(
        self, asked: Asked, taken: int, rejections: Sequence[Rejection], *, why: str = ""
    ) -> None:
        """Count a round of too few updates; raises as `RoundStrategy.stay`."""
        why = run_log.too_few(asked, taken, self.min_replies, rejections, why)
        measured = round_measurements(asked, [], rejections, {})
        model = self.broadcasting.model
        outcome = RoundOutcome(asked.round, model, self.step_state, measured, rejections, [])
        self.stay(outcome, why, reason="nobody-trained")

"""What the strategies of this package share: rounds one after another, over Flower's Message API.

How a round trains is theirs (`RoundStrategy.train_round`); who takes part, what they hold of
the model, how they evaluate and when a run ends is the same.
"""

from __future__ import annotations

import logging
import os
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from dare_agg.checkpoint.like_base import write_like_base
from dare_agg.checkpoint.one_file import OneFile
from dare_agg.deploy.identities import check_identities
from dare_agg.downlink.base import BASE_BYTES
from dare_agg.downlink.protocol import Downlink
from dare_agg.downlink.ways import make_downlink
from dare_agg.errors import ConfigError, RunError
from dare_agg.flower import run_log
from dare_agg.flower.base_pieces import send_base as bring
from dare_agg.flower.broadcasting import Broadcasting
from dare_agg.flower.clients import Client, Clients, Draw
from dare_agg.flower.evaluation import Evaluation, evaluation_metrics
from dare_agg.flower.limits import OWN_BYTES, ReplyLimit
from dare_agg.flower.metrics import MetricsFn, mean_metrics
from dare_agg.flower.named_base import open_base, store_for
from dare_agg.flower.receiving import Lent, give_back, lend
from dare_agg.flower.round_outcome import RoundOutcome
from dare_agg.flower.standing import Standing
from dare_agg.rounds import arguments
from dare_agg.rounds.draws import run_secret
from dare_agg.rounds.messages import ASK_EVALUATE, ASK_TRAIN
from dare_agg.rounds.missed import Tally
from dare_agg.rounds.settings import FederatedSettings
from dare_agg.rounds.step import StepState
from dare_agg.vectors.model import GlobalModel, Groups

LOG = logging.getLogger("flwr")
# Of the app's config.
ROUND_WORD = "server-round"


class RoundStrategy(Strategy):
    """Base of `DareStrategy` and `SecureStrategy`; the words are documented there."""

    def __init__(
        self,
        settings: FederatedSettings,
        *,
        fraction_train: float = 1.0,
        fraction_evaluate: float = 1.0,
        min_train_nodes: int = 2,
        min_evaluate_nodes: int = 2,
        min_available_nodes: int = 2,
        weighted_by_key: str = "num-examples",
        arrayrecord_key: str = "arrays",
        configrecord_key: str = "config",
        evaluate_metrics_aggr_fn: MetricsFn | None = None,
        seed: int | None = None,
        run: str = "",
        deadline: float | None = None,
        node_timeout: float = 600.0,
        max_empty_rounds: int | None = None,
        identities: Mapping[str, str] | None = None,
        downlink: Downlink | None = None,
        base: str | os.PathLike[str] | None = None,
        state: str | os.PathLike[str] | None = None,
        verify_every: int = 0,
        send_base: bool = False,
        reply_room: int = OWN_BYTES,
        round_hook: Callable[[RoundOutcome], bool | None] | None = None,
    ) -> None:
        self.settings = settings
        self.fraction_train = arguments.fraction("fraction_train", fraction_train)
        self.fraction_evaluate = arguments.fraction("fraction_evaluate", fraction_evaluate)
        self.min_train_nodes = arguments.count("min_train_nodes", min_train_nodes)
        self.min_evaluate_nodes = arguments.count("min_evaluate_nodes", min_evaluate_nodes)
        self.min_available_nodes = arguments.count("min_available_nodes", min_available_nodes)
        self.weighted_by_key = weighted_by_key
        self.arrayrecord_key = arrayrecord_key
        self.configrecord_key = configrecord_key
        self.evaluate_metrics_aggr_fn = evaluate_metrics_aggr_fn or mean_metrics
        self.run = run
        self.deadline = arguments.seconds("deadline", deadline)
        self.node_timeout = arguments.seconds("node_timeout", node_timeout) or 0.0
        self.max_empty_rounds = (
            None
            if max_empty_rounds is None
            else arguments.count("max_empty_rounds", max_empty_rounds)
        )
        self.reply_room = arguments.count("reply_room", reply_room)
        self.round_hook = round_hook
        self.secret = run_secret(seed)
        self.identities = check_identities(identities) if identities is not None else {}
        self.named_base = None if base is None else open_base(base)
        self.store = store_for(self.named_base, state, downlink, verify_every, send_base)
        self.downlink: Downlink = self.store or downlink or make_downlink()
        self.clients = Clients(identities=self.identities)
        self.standing = Standing(self.clients.called)
        self.broadcasting = Broadcasting(
            self.downlink,
            settings.terms.dense,
            settings.terms.exclude,
            arrayrecord_key,
            configrecord_key,
            base=None if self.named_base is None else self._open_base,
        )
        self._sent: OneFile | None = None
        if send_base and self.named_base is not None:
            self._sent = OneFile(self.named_base.checkpoint)
            self.broadcasting.base_facts = {BASE_BYTES: str(self._sent.size)}
        self.evaluation = Evaluation(
            self.broadcasting, ReplyLimit(own=self.reply_room), self.standing
        )
        self.train_config = ConfigRecord()
        self.step_state = StepState()
        self.outcome: RoundOutcome | None = None
        self._grid: Grid | None = None
        self._tally = Tally()
        self._in_own_loop = False
        self._told: RoundOutcome | None = None

    def summary(self) -> None:
        """Log who takes part, and what a run on disk begins with."""
        if self.store is not None and self.named_base is not None:
            base = self.named_base
            LOG.info(
                "\t├── Base: %s in %s; versions in %s", base.name, base.place, self.store.folder
            )
        LOG.info(
            "\t├── Sampling: fraction %.2f train, %.2f evaluate; at least %d to train, %d to "
            "evaluate, %d online",
            self.fraction_train,
            self.fraction_evaluate,
            self.min_train_nodes,
            self.min_evaluate_nodes,
            self.min_available_nodes,
        )

    # --- the run ---------------------------------------------------------------------------

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
        *,
        start_round: int = 1,
        step_state: StepState | None = None,
    ) -> Result:
        """Run rounds ``start_round`` to ``num_rounds`` and return Flower's `Result`.

        To resume, pass the arrays and step state of the last finished round and the round
        after it. A round that gets too few updates leaves the model as it is, as in FedAvg.
        A strategy that has its base on disk is given no arrays; those that it shows are read
        when they are looked at, as long as no later round has moved the model.

        Raises `ConfigError` without arrays or with them where the base says what to begin with,
        `RunError` when too few clients come online, when more rounds than
        ``max_empty_rounds`` in a row get too few updates, and when all of them did.
        """
        train_config = ConfigRecord() if train_config is None else train_config
        evaluate_config = ConfigRecord() if evaluate_config is None else evaluate_config
        result = run_log.RunResult()
        self._check_start(initial_arrays)
        run_log.starting(self, num_rounds, initial_arrays, train_config, evaluate_config)
        self.summary()
        arrays = self.begin(initial_arrays)
        self.train_config = train_config
        # A store goes on where it is, and so do the moments in it.
        self.step_state = step_state or (StepState() if self.store is None else self.step_state)
        self._tally = Tally()
        self.ready_for(num_rounds - start_round + 1)
        self._in_own_loop = True
        limit = min(timeout, self.deadline) if self.deadline else timeout
        started = time.monotonic()
        if evaluate_fn and start_round == 1:
            metrics = evaluate_fn(0, arrays)
            LOG.info("Initial global evaluation results: %s", metrics)
            if metrics is not None:
                result.evaluate_metrics_serverapp[0] = metrics
        for number in range(start_round, num_rounds + 1):
            if not self.may_go_on(number, number == start_round):
                break
            LOG.info("")
            LOG.info("[ROUND %d/%d]", number, num_rounds)
            self.standing.begin(number, num_rounds)
            merged, train_metrics = self.train_round(number, arrays, train_config, grid, limit)
            arrays = self._follow(arrays if merged is None else merged)
            if train_metrics is not None:
                run_log.aggregated(train_metrics)
                result.train_metrics_clientapp[number] = train_metrics
            messages = list(self.configure_evaluate(number, arrays, evaluate_config, grid))
            self.give_back()
            replies = self.evaluation.ask(grid, messages, timeout)
            client_metrics = self.aggregate_evaluate(number, replies)
            if client_metrics is not None:
                run_log.aggregated(client_metrics)
                result.evaluate_metrics_clientapp[number] = client_metrics
            server_metrics = None
            if evaluate_fn:
                LOG.info("Global evaluation")
                server_metrics = evaluate_fn(number, arrays)
                LOG.info("\t└──> MetricRecord: %s", server_metrics)
            if server_metrics is not None:
                result.evaluate_metrics_serverapp[number] = server_metrics
            if self._tell(train_metrics, client_metrics, server_metrics):
                LOG.info("stopped early after round %d", number)
                break
        self.ended()
        self.standing.note("end")
        result.arrays = arrays
        self.give_back()
        if self.named_base is not None:
            version = self.broadcasting.model.ref.version[:12]
            LOG.info("version %s has fingerprint %s", version, self.fingerprint())
        self._in_own_loop = False
        run_log.finished(time.monotonic() - started, result)
        self._tally.check(LOG)
        return result

    def begin(self, arrays: ArrayRecord | None = None) -> ArrayRecord:
        """Take what a run begins with, ``arrays`` or the base on disk; returns the newest version.

        `start` does so by itself; a loop of an app's own begins with it. Raises `ConfigError` as
        that.
        """
        self._check_start(arrays)
        if arrays is not None:
            self.broadcasting.adopt(arrays)
        else:
            self.broadcasting.begin()
        return self.broadcasting.arrays

    def _check_start(self, arrays: ArrayRecord | None) -> None:
        if arrays is None and self.named_base is None:
            raise ConfigError(
                "nothing to begin with: give start the model's arrays (initial_arrays), or the "
                "strategy a base on disk (base, state)"
            )
        newest = arrays is not None and self.broadcasting.is_newest(arrays)
        if self.named_base is not None and not (arrays is None or newest):
            raise ConfigError(
                f"the run begins with base {self.named_base.name!r}, and start was given arrays "
                "too; leave them out: start(grid, num_rounds=…)"
            )

    def _open_base(self, apart: tuple[str, ...]) -> GlobalModel:
        assert self.named_base is not None
        terms = self.settings.terms
        return self.named_base.model(terms.dense, terms.exclude, apart)

    def fingerprint(self) -> str:
        """The newest version's fingerprint, made of all its values, which are read for it."""
        return self.broadcasting.model.fingerprints.version

    def save_model(
        self,
        folder: str | os.PathLike[str],
        *,
        dtype: str | None = None,
        overwrite: bool = False,
    ) -> Path:
        """Write the newest version as the checkpoint that the run's base is, and its other files.

        Tile by tile: what libraries load the base with loads it. Each tensor has the dtype that
        it has in the base, to which values are rounded, or ``dtype``: "float32" holds what
        clients hold. Returns the folder (or ``.safetensors`` file).

        Raises `ConfigError` for a strategy without a base on disk, as `write_like_base` else.
        """
        if self.named_base is None:
            raise ConfigError(
                "save_model writes a model as the checkpoint that its base is, and this strategy "
                "has none on disk (base, state); write result.arrays with your framework"
            )
        out = Path(folder)
        checkpoint, model = self.named_base.checkpoint, self.broadcasting.model
        write_like_base(checkpoint, model, out, dtype=dtype, overwrite=overwrite)
        return out

    def _follow(self, arrays: ArrayRecord) -> ArrayRecord:
        """Go on with what `aggregate_train` returned; returns what the clients will hold.

        An override may have changed the merged arrays, or kept those before the round.
        """
        before = self.broadcasting.model.groups
        if self.broadcasting.follow(arrays):
            self.relay(before)
            if self.outcome is not None:
                self.outcome = replace(
                    self.outcome, model=self.broadcasting.model, step_state=self.step_state
                )
        return self.broadcasting.arrays

    def relay(self, before: Groups) -> None:
        """Lay the step's vectors out as the model is, where tied tensors came apart."""
        groups = self.broadcasting.model.groups
        if groups.layout != before.layout and groups.names == before.names:
            vectors = {n: groups.relaid(v, before) for n, v in self.step_state.vectors.items()}
            momenta = {
                name: replace(one, vector=groups.relaid(one.vector, before))
                for name, one in self.step_state.momenta.items()
            }
            # How much each tensor changed is of other tensors then: clients find it themselves.
            self.step_state = replace(self.step_state, vectors=vectors, levels=b"", momenta=momenta)

    def ready_for(self, rounds: int) -> None:
        """Prepare for so many rounds, before anyone is asked."""

    def may_go_on(self, number: int, first: bool) -> bool:
        """Whether there is to be this round, the ``first`` one of a start."""
        return True

    def ended(self) -> None:
        """Let go of what goes on beside the rounds."""

    def kept_facts(self) -> dict[str, Any]:
        """What a round's state keeps of a strategy besides."""
        return {}

    def take_up_begun(self) -> None:
        """Go on with a run that was begun and finished no round."""

    def take_up(self, facts: Mapping[str, Any]) -> None:
        """Look at the facts of the state that a run goes on from."""

    @abstractmethod
    def train_round(
        self, number: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid, limit: float
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Train one round in ``limit`` seconds; the arrays are None where the model stays."""

    def choose(self, grid: Grid, what: str, number: int) -> list[Client]:
        """Draw the clients of a round that are asked to train, or to evaluate."""
        fraction, least = (
            (self.fraction_train, self.min_train_nodes)
            if what == ASK_TRAIN
            else (self.fraction_evaluate, self.min_evaluate_nodes)
        )
        chosen = self.clients.choose(
            grid,
            self.hello(number),
            Draw(what, number, self.secret, fraction, least),
            least=self.min_available_nodes,
            timeout=self.node_timeout,
        )
        self.bring_base(grid, chosen)
        return chosen

    def meet(self, grid: Grid, number: int, least: int) -> list[Client]:
        """All clients that are online, once there are so many; raises as `Clients.wait`."""
        found = self.clients.wait(grid, self.hello(number), least, self.node_timeout)
        self.bring_base(grid, found)
        return found

    def bring_base(self, grid: Grid, clients: Sequence[Client]) -> None:
        """Send the base to those of the clients that have none, where the strategy does."""
        have = self.broadcasting.have
        lacking = [c for c in clients if not have.get(c.node, c.hello.have)]
        if self._sent is not None and lacking:
            bring(grid, lacking, self.broadcasting, self._sent, self.node_timeout)

    def hello(self, number: int) -> RecordDict:
        """The question who a client is, in this round."""
        return self.broadcasting.hello(ConfigRecord({**self.train_config, ROUND_WORD: number}))

    def lend(self, lent: Lent) -> None:
        """Have a grid push and pull as this strategy's own loop does."""
        self.give_back()
        lend(lent)
        self._grid = lent.grid

    def give_back(self) -> None:
        """Leave the grid that was lent as it was."""
        if self._grid is not None:
            give_back(self._grid)
        self._grid = None

    def move(self, outcome: RoundOutcome) -> ArrayRecord:
        """Go on to the model of a finished round; returns its arrays."""
        self.outcome, self.step_state = outcome, outcome.step_state
        self._tally.move()
        self.broadcasting.move(outcome.model)
        return self.broadcasting.arrays

    def stay(self, outcome: RoundOutcome, why: str, reason: str) -> None:
        """Count a round that moved nothing; raises `RunError` when there were too many.

        And where every answer was one that the apps would give again.
        """
        error = RunError(why, reason=reason)
        self._tally.miss(error, outcome.rejections, self.max_empty_rounds)
        LOG.warning("%s; the global model stays as it is", why)
        self.outcome = outcome

    def _tell(
        self,
        train_metrics: MetricRecord | None,
        client_metrics: MetricRecord | None,
        server_metrics: MetricRecord | None,
    ) -> bool:
        """Hand the round to the hook; returns whether to stop."""
        outcome = self.outcome
        if outcome is None:
            return False
        known = self.clients.known
        outcome.measurements["evaluate_download_bytes"] = self.evaluation.nbytes
        outcome.measurements["evaluate_failed"] = [
            {"name": known[node].hello.name, "reason": reason, "detail": detail}
            for node, reason, detail in self.evaluation.failures
            if node in known
        ]
        told = {node: one for node, one in self.evaluation.told.items() if node in known}
        outcome.measurements["evaluated"] = [
            {"name": known[node].hello.name, "metrics": told[node]}
            for node in sorted(told, key=lambda node: known[node].hello.order())
        ]
        outcome.measurements["away"] = self.clients.away()
        outcome.measurements["refused"] = self.clients.turned_away()
        self.outcome = replace(
            outcome,
            train_metrics=train_metrics,
            client_metrics=client_metrics,
            server_metrics=server_metrics,
        )
        return bool(self.round_hook(self.outcome)) if self.round_hook else False

    # --- evaluate --------------------------------------------------------------------------

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Make the messages of a federated evaluation; none when its fraction is 0."""
        if self.fraction_evaluate == 0.0:
            return []
        self.broadcasting.adopt(arrays)
        chosen = self.choose(grid, ASK_EVALUATE, server_round)
        config[ROUND_WORD] = server_round
        messages = self.evaluation.messages(chosen, config)
        self._lend_evaluation(messages, grid)
        return messages

    def _lend_evaluation(self, messages: Iterable[Message], grid: Grid) -> None:
        """Have these messages answered as here, whoever wrote the loop."""
        asked = {id(message) for message in messages}

        def ready(message: Message) -> Message | None:
            return message if id(message) in asked else None

        self.lend(Lent(grid, ready, self.evaluation.take, lambda: self.evaluation.limit))

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Aggregate the clients' evaluation metrics, weighted, in the order of clients."""
        self.give_back()
        metrics = evaluation_metrics(
            replies,
            self.clients.known,
            self.evaluate_metrics_aggr_fn,
            self.weighted_by_key,
            self.settings.terms.max_weight,
            self.settings.weight_bound,
        )
        self.tell_elsewhere(metrics)
        return metrics

    def tell_elsewhere(self, client_metrics: MetricRecord | None) -> None:
        """Hand the round to the hook where the loop is not this class's own."""
        if self._in_own_loop or self.outcome is None or self.outcome is self._told:
            return
        stop = self._tell(self.outcome.train_metrics, client_metrics, None)
        self._told = self.outcome
        if stop:
            LOG.warning("round_hook asks to stop, and this loop does not: call this class's start")

    # --- what subclasses of FedAvg call ----------------------------------------------------

    def _construct_messages(
        self, record: RecordDict, node_ids: list[int], message_type: str
    ) -> Iterable[Message]:
        """One message of this content for each node."""
        return [Message(record, node, message_type) for node in node_ids]

    def _check_and_log_replies(
        self, replies: Iterable[Message], is_train: bool, validate: bool = True
    ) -> tuple[list[Message], list[Message]]:
        """The replies with content, and the errors, which are logged; both are judged already."""
        every = list(replies)
        valid = [reply for reply in every if not reply.has_error()]
        errors = [reply for reply in every if reply.has_error()]
        where = "aggregate_train" if is_train else "aggregate_evaluate"
        LOG.info("%s: Received %d results and %d failures", where, len(valid), len(errors))
        for reply in errors:
            node, why = reply.metadata.src_node_id, reply.error.reason
            LOG.info("\t> Received error in reply from node %d: %s", node, why)
        return valid, errors

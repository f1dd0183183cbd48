"""`DareStrategy`: Flower's FedAvg with compact updates, a merge method and a server step."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from dare_agg.codec.budget import ClientTerms, UploadBudget
from dare_agg.codec.derive import derive_key
from dare_agg.codec.mask import DropRate, parse_drop_rate
from dare_agg.codec.payload import payload_bytes
from dare_agg.codec.update import CODEC_VERSION, HEADER_BYTES
from dare_agg.deploy.identities import check_identities
from dare_agg.downlink.protocol import Downlink, FullDownlink
from dare_agg.errors import ConfigError, DareError, RunError
from dare_agg.flower import arguments
from dare_agg.flower.clients import Client, Clients, sample
from dare_agg.flower.exchange import exchange
from dare_agg.flower.internals import set_lifetime
from dare_agg.flower.records import (
    ASK_EVALUATE,
    ASK_TRAIN,
    DOWN_PREFIX,
    ORDER_KEY,
    REPLY_KEY,
    Hello,
    read_config,
    read_have,
    read_refusal,
)
from dare_agg.flower.replies import Inbox, MetricsFn, TrainReply, weighted_metrics
from dare_agg.flower.round_outcome import OpenRound, RoundOutcome, round_measurements
from dare_agg.flower.transport import message_bytes, pack, to_numpy, to_record
from dare_agg.rounds.plan import make_plans
from dare_agg.rounds.same_code import package_fingerprint
from dare_agg.rounds.server import Rejection, advance, check_weight, merge_round
from dare_agg.rounds.settings import FederatedSettings
from dare_agg.rounds.step import ServerStep, StepState
from dare_agg.rounds.terms import UpdateTerms
from dare_agg.vectors.model import GlobalModel, global_model

LOG = logging.getLogger("flwr")


class DareStrategy(Strategy):
    """Federated fine-tuning with DARE updates; a drop-in for Flower's FedAvg.

    The words of FedAvg mean what they mean there. The others:

    Parameters
    ----------
    method, scaling, options : merge method ("task-arithmetic", "ties", "average", "fisher",
        "regmean"), λ, and the method's own options. For the last two the training code must
        return statistics (``dare_agg.flower.STATISTICS_KEY``).
    drop_rate, values, mask : of the clients' updates (0.9, "b1", "stratified").
    dense, dense_values : patterns of tensors that travel whole, and their value format.
    exclude : patterns of tensors that never leave a client.
    weighting : "examples" (``weighted_by_key`` of each reply) or "equal".
    server_step : a row of `SERVER_STEPS`, with numbers as in "adam(tau=1e-4)", or made.
    max_weight : largest number of examples a client may claim.
    seed : makes masks, keys and samples the same in every run; None draws a secret.
    deadline : seconds after which a round closes with the replies that are there.
    node_timeout : seconds to wait for enough clients to be online.
    min_replies : fewest accepted updates a round needs; below, the run fails.
    max_empty_rounds : how many rounds in a row may miss ``min_replies`` before it fails.
    client_terms : gives a client (by its `Hello`) its own drop rate and value format.
    upload_budget : bytes (and seconds, by a node's own uplink) of a client's upload a round;
        chooses drop rate and format of each client instead of ``drop_rate`` and ``values``.
    identities : public keys (hex) of the clients by name; their replies must be signed.
    downlink : how the model reaches the clients; the full arrays unless given.
    round_hook : called with each `RoundOutcome`; returning True ends the run early.
    """

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
        drop_rate: DropRate | float | str = UpdateTerms.drop_rate,
        values: str = UpdateTerms.values,
        mask: str = UpdateTerms.mask,
        dense: Sequence[str] = UpdateTerms.dense,
        exclude: Sequence[str] = UpdateTerms.exclude,
        dense_values: str = UpdateTerms.dense_values,
        weighting: str = FederatedSettings.weighting,
        server_step: str | ServerStep = "plain",
        options: Mapping[str, Any] | None = None,
        max_weight: float = UpdateTerms.max_weight,
        threads: int = FederatedSettings.threads,
        seed: int | None = None,
        run: str = "",
        deadline: float | None = None,
        node_timeout: float = 600.0,
        min_replies: int = 1,
        max_empty_rounds: int = 0,
        client_terms: Callable[[Hello], ClientTerms | None] | None = None,
        upload_budget: UploadBudget | None = None,
        identities: Mapping[str, str] | None = None,
        downlink: Downlink | None = None,
        round_hook: Callable[[RoundOutcome], bool | None] | None = None,
    ) -> None:
        self.fraction_train = arguments.fraction("fraction_train", fraction_train)
        self.fraction_evaluate = arguments.fraction("fraction_evaluate", fraction_evaluate)
        self.min_train_nodes = arguments.count("min_train_nodes", min_train_nodes)
        self.min_evaluate_nodes = arguments.count("min_evaluate_nodes", min_evaluate_nodes)
        self.min_available_nodes = arguments.count("min_available_nodes", min_available_nodes)
        self.weighted_by_key = weighted_by_key
        self.arrayrecord_key = arrayrecord_key
        self.configrecord_key = configrecord_key
        self.train_metrics_aggr_fn = train_metrics_aggr_fn
        self.evaluate_metrics_aggr_fn = evaluate_metrics_aggr_fn
        self.settings = FederatedSettings(
            UpdateTerms(
                drop_rate=parse_drop_rate(drop_rate),
                values=values,
                mask=mask,
                dense=dense,  # type: ignore[arg-type]
                exclude=exclude,  # type: ignore[arg-type]
                dense_values=dense_values,
                max_weight=max_weight,
            ),
            method=method,
            scaling=scaling,
            options=dict(options or {}),
            weighting=weighting,
            server_step=arguments.as_step(server_step),
            threads=threads,
        )
        self.run = run
        self.deadline = arguments.seconds("deadline", deadline)
        self.node_timeout = arguments.seconds("node_timeout", node_timeout) or 0.0
        self.min_replies = arguments.count("min_replies", min_replies, least=1)
        self.max_empty_rounds = arguments.count("max_empty_rounds", max_empty_rounds)
        self.client_terms = client_terms
        self.upload_budget = upload_budget
        if client_terms is not None and upload_budget is not None:
            raise ConfigError("client_terms and upload_budget both choose; give one of them")
        self.downlink = downlink if downlink is not None else FullDownlink()
        self.round_hook = round_hook
        self.secret = arguments.run_secret(seed)
        self.outcome: RoundOutcome | None = None
        self.identities = check_identities(identities) if identities is not None else {}
        self._clients = Clients(self.downlink.name, identities=self.identities)
        self._have: dict[int, str] = {}
        self._packed: dict[str, tuple[bytes, ArrayRecord]] = {}
        self._model: GlobalModel | None = None
        self._arrays: ArrayRecord | None = None
        self._step_state = StepState()
        self._open: OpenRound | None = None
        self._empty_rounds = 0
        self._evaluate_bytes = 0

    def summary(self) -> None:
        """Log what the run is set to."""
        settings, terms = self.settings, self.settings.terms
        LOG.info(
            "\t├── Sampling: fraction %.2f train, %.2f evaluate; at least %d to train, %d to "
            "evaluate, %d online",
            self.fraction_train,
            self.fraction_evaluate,
            self.min_train_nodes,
            self.min_evaluate_nodes,
            self.min_available_nodes,
        )
        LOG.info(
            "\t├── Updates: drop rate %.6g, values %s, mask %s; dense %s as %s; local %s",
            terms.drop_rate.p,
            terms.values,
            terms.mask,
            list(terms.dense),
            terms.dense_values,
            list(terms.exclude),
        )
        LOG.info(
            "\t└── Merge: %s, scaling %g, weights by %s, server step %s %s; downlink %s",
            settings.method,
            settings.scaling,
            settings.weighting,
            settings.server_step.name,
            dict(settings.server_step.numbers),
            self.downlink.name,
        )

    # --- the run ---------------------------------------------------------------------------

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
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
        after it. Raises `RunError` when too few clients come online or a round gets too few
        updates.
        """
        train_config = ConfigRecord() if train_config is None else train_config
        evaluate_config = ConfigRecord() if evaluate_config is None else evaluate_config
        result = Result()
        LOG.info("Starting %s:", type(self).__name__)
        self.summary()
        self._adopt(initial_arrays)
        self._clients.config = train_config
        self._step_state = step_state or StepState()
        arrays = self._current_arrays()
        started = time.monotonic()
        if evaluate_fn and start_round == 1:
            metrics = evaluate_fn(0, arrays)
            if metrics is not None:
                LOG.info("Initial model: %s", dict(metrics))
                result.evaluate_metrics_serverapp[0] = metrics
        for number in range(start_round, num_rounds + 1):
            LOG.info("")
            LOG.info("[ROUND %d/%d]", number, num_rounds)
            arrays, train_metrics = self._train(number, arrays, train_config, grid, timeout)
            if train_metrics is not None:
                result.train_metrics_clientapp[number] = train_metrics
            client_metrics = self._evaluate(number, arrays, evaluate_config, grid, timeout)
            if client_metrics is not None:
                result.evaluate_metrics_clientapp[number] = client_metrics
            server_metrics = evaluate_fn(number, arrays) if evaluate_fn else None
            if server_metrics is not None:
                LOG.info("Global model: %s", dict(server_metrics))
                result.evaluate_metrics_serverapp[number] = server_metrics
            if self._finish_round(train_metrics, client_metrics, server_metrics):
                LOG.info("stopped early after round %d", number)
                break
        result.arrays = arrays
        LOG.info("")
        LOG.info("finished in %.1f s", time.monotonic() - started)
        return result

    def _train(
        self, number: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid, timeout: float
    ) -> tuple[ArrayRecord, MetricRecord | None]:
        messages = list(self.configure_train(number, arrays, config, grid))
        limit = min(timeout, self.deadline) if self.deadline else timeout
        for message in messages:
            set_lifetime(message, limit + 60)
        opened = self._open
        if opened is not None:
            self._collect(grid, messages, opened, config, limit)
        merged, metrics = self._close_train()
        return (arrays if merged is None else merged), metrics

    def _collect(
        self,
        grid: Grid,
        messages: Sequence[Message],
        opened: OpenRound,
        config: ConfigRecord,
        limit: float,
    ) -> None:
        """Take replies as they come; who lost its version is sent the full model once more."""
        until = time.monotonic() + limit
        lost: list[Client] = []
        by_node = {client.node: client for client in opened.clients}
        for index, reply in exchange(grid, messages, limit):
            node = messages[index].metadata.dst_node_id
            if self._lost_its_version(node, reply):
                lost.append(by_node[node])
            else:
                opened.inbox.take(node, reply)
        left = until - time.monotonic()
        if lost and left > 0:
            LOG.info("sending the whole model again to %d clients", len(lost))
            again = [self._train_message(opened, client, config) for client in lost]
            for index, reply in exchange(grid, again, left):
                opened.inbox.take(again[index].metadata.dst_node_id, reply)

    def _lost_its_version(self, node: int, reply: Message) -> bool:
        if reply.has_error() or not self._have.get(node):
            return False
        receipt = read_config(reply.content, REPLY_KEY)
        refusal = read_refusal(receipt) if receipt is not None else None
        if receipt is None or refusal is None or refusal[0] != "base":
            return False
        have = read_have(receipt)
        # Named again, it cannot be what the client lacks.
        self._have[node] = "" if have == self._have[node] else have
        return True

    # --- train -----------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Sample clients, make their plans and messages."""
        self._open = None
        if self.fraction_train == 0.0:
            return []
        self._adopt(arrays)
        assert self._model is not None
        chosen = self._choose(
            grid, self.fraction_train, self.min_train_nodes, server_round, "train"
        )
        terms = [self._terms(client.hello) for client in chosen]
        plans = make_plans(
            derive_key(self.secret, "round", server_round, length=32),
            server_round,
            terms,
            self.settings.terms,
            self._model.ref,
            run=self.run,
            shared_mask=self.settings.shared_mask,
        )
        by_node = {client.node: plan for client, plan in zip(chosen, plans, strict=True)}
        signers = {
            client.node: (client.hello.name, self.identities[client.hello.name])
            for client in chosen
            if self.identities
        }
        inbox = Inbox(
            by_node,
            self.weighted_by_key,
            self.settings.weighting,
            signers=signers,
            layout=self._model.groups.layout,
        )
        opened = OpenRound(server_round, chosen, by_node, inbox)
        self._open = opened
        config["server-round"] = server_round
        if self.settings.terms.statistics:
            config["statistics"] = self.settings.terms.statistics
        return [self._train_message(opened, client, config) for client in chosen]

    def _terms(self, hello: Hello) -> ClientTerms | None:
        """What a client is given of its own: by its budget, or by the app's function."""
        if self.upload_budget is None or self._model is None:
            return self.client_terms(hello) if self.client_terms else None
        ref, terms = self._model.ref, self.settings.terms
        dense = ref.dense_size and HEADER_BYTES + payload_bytes(terms.dense_values, ref.dense_size)
        return self.upload_budget.terms(ref.size, dense, hello.uplink_kbit_s, mask=terms.mask)

    def _train_message(self, opened: OpenRound, client: Client, config: ConfigRecord) -> Message:
        order = ConfigRecord({**opened.plans[client.node].to_record(), **self._order(ASK_TRAIN)})
        content = self._content(client, order, config)
        opened.download[client.node] = opened.download.get(client.node, 0) + message_bytes(content)
        return Message(content, client.node, MessageType.TRAIN)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Judge and merge replies that Flower's own loop collected."""
        if self._open is not None:
            for reply in replies:
                self._open.inbox.take(reply.metadata.src_node_id, reply)
        return self._close_train()

    def _close_train(self) -> tuple[ArrayRecord | None, MetricRecord | None]:
        opened, model = self._open, self._model
        self._open = None
        if opened is None or model is None:
            return None, None
        opened.inbox.close()
        replies = opened.inbox.in_order()
        rejections = opened.inbox.all_rejections()
        if len(replies) < self.min_replies:
            self._count_empty_round(opened, rejections)
            return None, None
        self._empty_rounds = 0
        accepted = [reply.accepted for reply in replies]
        merged = merge_round(model, accepted, self.settings)
        plans = [reply.plan for reply in accepted]
        moved, self._step_state = advance(
            model, self._step_state, merged, self.settings, self.downlink, plans
        )
        self._model, self._arrays = moved, None
        for reply in replies:
            self._have[reply.node] = "" if reply.have == "-" else reply.have
        measurements = round_measurements(opened, replies, rejections, merged.measurements)
        metrics = self._train_metrics(replies, merged.weights)
        self.outcome = RoundOutcome(
            opened.number, moved, self._step_state, measurements, rejections, plans, metrics
        )
        LOG.info(
            "round %d: %d of %d updates merged; %s bytes up and %s down per client",
            opened.number,
            len(replies),
            len(opened.plans),
            f"{_mean([reply.update_bytes + reply.dense_bytes for reply in replies]):,}",
            f"{_mean(list(opened.download.values())):,}",
        )
        return self._current_arrays(), metrics

    def _count_empty_round(self, opened: OpenRound, rejections: Sequence[Rejection]) -> None:
        self._empty_rounds += 1
        counts = Counter(rejection.reason for rejection in rejections)
        reasons = ", ".join(f"{reason} ×{count}" for reason, count in sorted(counts.items()))
        first = f"; first: {rejections[0].detail}" if rejections else ""
        text = (
            f"round {opened.number}: {len(opened.inbox.replies)} of {len(opened.plans)} clients "
            f"sent an update that counts, {self.min_replies} are needed ({reasons}){first}"
        )
        if self._empty_rounds > self.max_empty_rounds:
            raise RunError(text, reason="nobody-trained")
        LOG.warning("%s; the global model stays as it is", text)
        assert self._model is not None
        self.outcome = RoundOutcome(
            opened.number,
            self._model,
            self._step_state,
            round_measurements(opened, [], rejections, {}),
            rejections,
            [],
        )

    def _train_metrics(
        self, replies: Sequence[TrainReply], weights: Sequence[float]
    ) -> MetricRecord | None:
        records = [RecordDict({"metrics": reply.metrics}) for reply in replies]
        return self._metrics(self.train_metrics_aggr_fn, records, weights)

    def _metrics(
        self, own: MetricsFn | None, records: list[RecordDict], weights: Sequence[float]
    ) -> MetricRecord | None:
        if own is None:
            return weighted_metrics(records, weights, self.weighted_by_key)
        try:
            return own(records, self.weighted_by_key)
        except Exception as error:  # what clients put there must not end the run
            LOG.warning("metrics were not aggregated: %s: %s", type(error).__name__, error)
            return None

    # --- evaluate --------------------------------------------------------------------------

    def _evaluate(
        self, number: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid, timeout: float
    ) -> MetricRecord | None:
        messages = list(self.configure_evaluate(number, arrays, config, grid))
        replies = []
        for index, reply in exchange(grid, messages, timeout):
            node = messages[index].metadata.dst_node_id
            if self._lost_its_version(node, reply):
                continue
            receipt = None if reply.has_error() else read_config(reply.content, REPLY_KEY)
            if receipt is not None:
                self._have[node] = read_have(receipt) or self._have.get(node, "")
            replies.append(reply)
        return self.aggregate_evaluate(number, replies)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Make the messages of a federated evaluation; none when its fraction is 0."""
        if self.fraction_evaluate == 0.0:
            return []
        self._adopt(arrays)
        chosen = self._choose(
            grid, self.fraction_evaluate, self.min_evaluate_nodes, server_round, "evaluate"
        )
        config["server-round"] = server_round
        messages = []
        total = 0
        for client in chosen:
            order = ConfigRecord(self._order(ASK_EVALUATE))
            content = self._content(client, order, config)
            total += message_bytes(content)
            messages.append(Message(content, client.node, MessageType.EVALUATE))
        self._evaluate_bytes = total
        return messages

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Aggregate the clients' evaluation metrics, weighted, in the order of clients."""
        rows: list[tuple[tuple[int, int, str], int, RecordDict, float]] = []
        for reply in replies:
            node = reply.metadata.src_node_id
            client = self._clients.known.get(node)
            if reply.has_error() or client is None:
                LOG.warning("evaluation on node %d failed", node)
                continue
            row = self._evaluate_row(reply)
            if row is not None:
                rows.append((client.hello.order(), node, *row))
        rows.sort(key=lambda row: row[:2])
        total = sum(weight for *_, weight in rows)
        if not rows:
            return None
        weights = [weight / total for *_, weight in rows]
        return self._metrics(
            self.evaluate_metrics_aggr_fn, [record for _, _, record, _ in rows], weights
        )

    def _evaluate_row(self, reply: Message) -> tuple[RecordDict, float] | None:
        metrics = next(iter(reply.content.metric_records.values()), None)
        if metrics is None:
            return None
        try:
            weight = check_weight(
                metrics.get(self.weighted_by_key, 1.0), self.settings.terms.max_weight
            )
        except DareError as error:
            LOG.warning("evaluation of node %d left out: %s", reply.metadata.src_node_id, error)
            return None
        return RecordDict({"metrics": metrics}), weight

    # --- shared ----------------------------------------------------------------------------

    def _adopt(self, arrays: ArrayRecord) -> None:
        """Take over arrays that are not the ones this strategy made itself."""
        if self._model is not None and arrays is self._arrays:
            return
        terms = self.settings.terms
        given = global_model(to_numpy(arrays), dense=terms.dense, exclude=terms.exclude)
        self._model = self.downlink.start(given)
        facts = self.downlink.facts()
        self._clients.facts = {
            **facts,
            **({"dense": list(terms.dense)} if facts and terms.dense else {}),
            **({"exclude": list(terms.exclude)} if facts and terms.exclude else {}),
        }
        # A downlink may have rounded the model: then its arrays are not the given ones.
        self._arrays = arrays if self._model is given else None

    def _current_arrays(self) -> ArrayRecord:
        assert self._model is not None
        if self._arrays is None:
            self._arrays = to_record(self._model.arrays())
        return self._arrays

    def _choose(
        self, grid: Grid, fraction: float, minimum: int, number: int, what: str
    ) -> list[Client]:
        needed = max(minimum, self.min_available_nodes, 1)
        ready = self._clients.wait(grid, needed, self.node_timeout)
        count = max(int(len(ready) * fraction), minimum, 1)
        chosen = sample(ready, count, derive_key(self.secret, what, length=32), number)
        LOG.info("%s: %d of %d clients", what, len(chosen), len(ready))
        return chosen

    def _order(self, ask: str) -> dict[str, Any]:
        assert self._model is not None
        return {
            "ask": ask,
            "codec": CODEC_VERSION,
            "package": package_fingerprint(),
            "version": self._model.ref.version,
            "downlink": self.downlink.name,
            "arrays-key": self.arrayrecord_key,
            **self._clients.facts,
        }

    def _content(self, client: Client, order: ConfigRecord, config: ConfigRecord) -> RecordDict:
        """The app's own records, our order, and what the downlink says this client needs."""
        assert self._model is not None
        have = self._have.setdefault(client.node, client.hello.have)
        broadcast = self.downlink.broadcast(self._model, have)
        content = RecordDict({self.configrecord_key: config, ORDER_KEY: order})
        if broadcast.full:
            content[self.arrayrecord_key] = self._current_arrays()
        self._have[client.node] = broadcast.holds
        for name, payload in broadcast.payloads.items():
            # The same bytes for several clients are packed once.
            if self._packed.get(name, (b"", None))[0] is not payload:
                self._packed[name] = (payload, pack(payload))
            content[DOWN_PREFIX + name] = self._packed[name][1]
        return content

    def _finish_round(
        self,
        train_metrics: MetricRecord | None,
        client_metrics: MetricRecord | None,
        server_metrics: MetricRecord | None,
    ) -> bool:
        """Hand the round to the hook; returns whether to stop."""
        outcome = self.outcome
        if outcome is None:
            return False
        outcome.measurements["evaluate_download_bytes"] = self._evaluate_bytes
        self.outcome = replace(
            outcome,
            train_metrics=train_metrics,
            client_metrics=client_metrics,
            server_metrics=server_metrics,
        )
        return bool(self.round_hook(self.outcome)) if self.round_hook else False


def _mean(values: Sequence[int]) -> int:
    return round(sum(values) / len(values)) if values else 0

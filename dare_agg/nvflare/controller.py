"""The server's controller: NVFlare's FedAvg with compact updates and versions for the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from nvflare.apis.client import Client
from nvflare.apis.controller_spec import ClientTask, TaskCompletionStatus
from nvflare.apis.fl_constant import FLMetaKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_common.aggregators.weighted_aggregation_helper import (
    WeightedAggregationHelper,
    filter_aggregatable_metrics,
)
from nvflare.app_common.workflows.fedavg import FedAvg

from dare_agg.errors import ConfigError, DareError
from dare_agg.nvflare.answers import Answered
from dare_agg.nvflare.open_round import Finished, row_text
from dare_agg.nvflare.run import Run
from dare_agg.nvflare.wire import ANSWER, AT, HAVE, HELLO, ORDER, PULL, REFUSAL, REPLY, VERSION
from dare_agg.nvflare.words import read_words
from dare_agg.rounds.messages import Hello, Refusal

ROWS = "dare_rounds.jsonl"
# Words of FedAvg that have no meaning here → the way out.
_NOT_HERE: Mapping[str, str] = {
    "aggregator": "choose how updates are merged by method, robust and server_step",
    "exclude_vars": "name what never leaves a site in exclude",
    "enable_tensor_disk_offload": "leave it out: what arrives is a few bits a parameter",
}


class DareFedAvg(FedAvg):  # type: ignore[misc]
    """Federated averaging with DARE updates; a drop-in for NVFlare's FedAvg.

    The words of FedAvg mean what they mean there; ``dare`` are those of
    `dare_agg.nvflare.words.Words`, as a mapping. Each site needs a `DareFilter` for the task's
    data and for its results; `dare_agg.nvflare.DareRecipe` makes a whole job.

    A site's answer that is malformed, of other code, not finite or missing is rejected with a
    reason, and the round goes on while enough are left; else the job fails once that was so too
    often. `ROWS` in the job's run folder holds a line for each round.

    Raises `ConfigError` for a word that is unknown, out of bounds, or has no meaning here.
    """

    model: Any
    num_rounds: int

    def __init__(self, *args: Any, dare: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        for word, remedy in _NOT_HERE.items():
            if kwargs.get(word):
                raise ConfigError(f"{word} is of no use with DARE; {remedy}")
        super().__init__(*args, **kwargs)
        self.dare = dict(dare or {})
        self._words = read_words(self.dare)
        self._rounds = Run(self._words, self.num_clients, self.logger)
        self._silent: set[str] = set()

    # --- the job ---------------------------------------------------------------------------

    def run(self) -> None:
        """Run the rounds; raises `RunError` where none of them got enough updates."""
        self.engine.register_aux_message_handler(topic=PULL, message_handle_func=self._give_piece)
        done = self._rounds.begin(self._given())
        self.start_round += done
        self.num_rounds = max(0, self.num_rounds - done)
        self.model = FLModel(params=dict(self._rounds.model.arrays()), params_type=ParamsType.FULL)
        super().run()
        if not self.abort_signal.triggered:
            self._rounds.finish()

    def _given(self) -> dict[str, np.ndarray]:
        """The arrays that the job starts with, from its persistor or its own words."""
        given: Any = self.load_model() if self.model is None else self.model
        params = given.params if isinstance(given, FLModel) else given
        return {name: np.asarray(array) for name, array in params.items()}

    def sample_clients(self, num_clients: int | None = None) -> list[str]:
        """Draw the sites of a round, the same in every run of one seed."""
        sites = [client.name for client in self.engine.get_clients()]
        drawn = self._rounds.drawn(self.current_round + 1, sites, num_clients or len(sites))
        self.info(f"Sampled clients: {drawn}")
        return drawn

    def send_model(
        self,
        task_name: str = "train",
        data: FLModel | None = None,
        targets: Sequence[str] | None = None,
        min_responses: int | None = None,
        timeout: int = 0,
        callback: Callable[[FLModel], Any] | None = None,
    ) -> None:
        """Give each site a task of its own: its order, and the model where that travels whole."""
        assert data is not None
        opened = self._rounds.open(self.current_round + 1, targets or [])
        self.set_fl_context(data)
        params = data.params if self._rounds.whole else {}
        timeout = timeout or math.ceil(self._words.deadline or 0)
        for site in opened.plans:
            order = FLModel(
                params=params,
                params_type=ParamsType.FULL,
                meta={**(data.meta or {}), ORDER: self._rounds.order(site)},
                start_round=data.start_round,
                current_round=data.current_round,
                total_rounds=data.total_rounds,
            )
            task = self._prepare_task(order, task_name, timeout, callback)
            task.before_task_sent_cb = self._before_sent
            self.send(task, self.fl_ctx, targets=[site])

    def _before_sent(self, client_task: ClientTask, fl_ctx: FLContext) -> None:
        """Send nothing to a site that would not understand it, or would answer other code's."""
        try:
            said = _peer_prop(fl_ctx, HELLO)
            if said is None:
                raise DareError(
                    "the site has no DareFilter; put it into its filters of incoming tasks and of "
                    "results (DareRecipe does)",
                    reason="mod",
                )
            Hello.read(said)
        except DareError as error:
            self._rounds.reject(client_task.client.name, error.reason, str(error))
            client_task.task.completion_status = TaskCompletionStatus.CANCELLED
            return
        self._prepare_task_data(client_task, fl_ctx)

    def _give_piece(self, topic: str, request: Shareable, fl_ctx: FLContext) -> Shareable:
        """Answer a site that pulls a version."""
        reply = make_reply(ReturnCode.OK)
        site = fl_ctx.get_peer_context().get_identity_name()
        try:
            version, have, at = (request.get(word) for word in (VERSION, HAVE, AT))
            reply[ANSWER] = self._rounds.piece(site, version, have, at)
        except DareError as error:
            reply[ANSWER] = Refusal.of(error).to_record()
        return reply

    # --- results ---------------------------------------------------------------------------

    def _accept_train_result(
        self, client_name: str, result: Shareable, fl_ctx: FLContext, is_unknown_task: bool = False
    ) -> bool:
        code = result.get_return_code()
        if code and code != ReturnCode.OK:
            said = _peer_prop(fl_ctx, REFUSAL)
            refusal = None if said is None else Refusal.read(said)
            reason, detail = "client-error", f"NVFlare's code {code}; see the site's log"
            if refusal is not None:
                reason, detail = refusal.reason, refusal.detail
            self._rounds.reject(client_name, reason, detail)
            return False
        return bool(super()._accept_train_result(client_name, result, fl_ctx, is_unknown_task))

    def process_result_of_unknown_task(
        self,
        client: Client,
        task_name: str,
        client_task_id: str,
        result: Shareable,
        fl_ctx: FLContext,
    ) -> None:
        """Leave out an answer that came after its round was over."""
        self.info(f"{client.name}: an answer to {task_name} came too late and is left out")

    def _aggregate_one_result(self, result: FLModel) -> bool:
        meta = result.meta or {}
        site = meta["client_name"]
        reply = meta.get(REPLY)
        taken = self._rounds.take(
            site,
            reply if isinstance(reply, dict) else None,
            result.params if isinstance(result.params, dict) else {},
            self._weight(site, meta),
            result.metrics if isinstance(result.metrics, dict) else {},
        )
        self._received_count += taken
        self.info(f"Took {self._received_count}/{self._expected_count} updates")
        return taken

    def _weight(self, site: str, meta: Mapping[str, Any]) -> object:
        """What a site says it weighs: 1 where it says nothing, as in FedAvg."""
        weight = meta.get(FLMetaKey.NUM_STEPS_CURRENT_ROUND)
        if weight is None:
            if site not in self._silent:
                self._silent.add(site)
                self.info(
                    f"{site} says nothing of its training steps and counts as 1; give FLModel "
                    f"meta={{{FLMetaKey.NUM_STEPS_CURRENT_ROUND!r}: number}}"
                )
            weight = 1.0
        factor = self.aggregation_weights.get(site, 1.0)
        return weight if factor == 1 or not isinstance(weight, int | float) else weight * factor

    def _get_aggregated_result(self) -> FLModel:
        finished = self._rounds.close()
        self._write(finished)
        return FLModel(
            params=dict(finished.arrays),
            params_type=ParamsType.FULL,
            metrics=self._metrics(finished),
            current_round=self.current_round,
            meta={"nr_aggregated": len(finished.answers), "current_round": self.current_round},
        )

    def _metrics(self, finished: Finished) -> dict[str, Any] | None:
        """The sites' metrics, weighted as their updates, in the order of sites."""
        helper = WeightedAggregationHelper()
        for (site, one), weight in zip(finished.answers.items(), finished.weights, strict=False):
            if found := _finite(one):
                helper.add(found, weight, site, self.current_round)
        return helper.get_result() or None

    def _write(self, finished: Finished) -> None:
        with (Path(self.get_run_dir()) / ROWS).open("a", encoding="utf-8") as file:
            file.write(row_text(finished.measurements) + "\n")


def _finite(answered: Answered) -> dict[str, Any]:
    return dict(filter_aggregatable_metrics(dict(answered.metrics)))


def _peer_prop(fl_ctx: FLContext, name: str) -> Mapping[str, Any] | None:
    """A public property of the site that a message came from, None where it is no mapping."""
    peer = fl_ctx.get_peer_context()
    found = None if peer is None else peer.get_prop(name)
    return found if isinstance(found, dict) else None

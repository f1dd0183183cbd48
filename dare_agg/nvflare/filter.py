"""The client's filter: whole arrays behind it, a version and a compact update in front of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.filter import Filter
from nvflare.apis.fl_constant import FilterKey, FLContextKey, ReturnCode, SystemConfigs
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.fuel.utils.config_service import ConfigService

from dare_agg.errors import BaseMismatchError, DareError, UpdateError
from dare_agg.files.cache import cache_folder
from dare_agg.nvflare.payloads import pull
from dare_agg.nvflare.turn import Site, Turn, begin
from dare_agg.nvflare.wire import ANSWER, AT, HAVE, HELLO, ORDER, PULL, REFUSAL, REPLY, VERSION
from dare_agg.rounds.messages import Hello, Refusal

# Of the context, kept for as long as a task and as the job.
_TURN, _LOCAL = "__dare_turn__", "__dare_local__"
# A site's own word, in its resources.json or as NVFLARE_DARE_BASE: a safetensors file.
_BASE_WORD = "dare_base"
_PULL_SECONDS = 60.0
_TRIES = 5


class DareFilter(Filter):
    """Stands in both of a client's chains for the task "train": data in, results out.

    In front of it an order and what brings the site to the version asked for, behind it the whole
    model as NVFlare's FedAvg sends it; so the executor and the training script stay as they are.
    Versions are kept in ``$DARE_AGG_CACHE`` (by default ``~/.cache/dare-agg``). Of results it
    makes the update that the order's plan asks for. An order that this site cannot or must not
    follow is answered with a typed reason, never with a wrong update; tasks of other controllers
    and results that are errors pass through.
    """

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Say with every message of this site that the filter is here, and of which code."""
        if event_type == EventType.START_RUN:
            hello = Hello(name=fl_ctx.get_identity_name()).to_record()
            fl_ctx.set_prop(HELLO, hello, private=False, sticky=True)

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        """As the class says, by the chain's direction."""
        if fl_ctx.get_prop(FLContextKey.FILTER_DIRECTION) == FilterKey.IN:
            return self._task(shareable, fl_ctx)
        return self._result(shareable, fl_ctx)

    # --- tasks -----------------------------------------------------------------------------

    def _task(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        dxo = _dxo(shareable)
        if dxo is None or ORDER not in dxo.meta:
            return shareable
        try:
            turn = begin(dxo.meta[ORDER], _site(fl_ctx), dxo.data or None, self._pull(fl_ctx))
        except DareError as error:
            # Nothing must be trained, and only an exception stops a task here. The reason goes
            # with the reply.
            refusal = Refusal.of(error).to_record()
            fl_ctx.set_prop(REFUSAL, refusal, private=False, sticky=False)
            raise
        fl_ctx.set_prop(_TURN, turn, private=True, sticky=False)
        meta = {name: value for name, value in dxo.meta.items() if name != ORDER}
        arrays = turn.arrays(fl_ctx.get_prop(_LOCAL, {}))
        return DXO(DataKind.WEIGHTS, arrays, meta).update_shareable(shareable)

    def _pull(self, fl_ctx: FLContext) -> Any:
        """How payloads come: asked for piece by piece over the job's own channel."""

        def ask(version: str, have: str, at: int) -> Mapping[str, Any]:
            request = Shareable()
            request.update({VERSION: version, HAVE: have, AT: at})
            said: object = "no answer"
            for _ in range(_TRIES):
                replies = fl_ctx.get_engine().send_aux_request(
                    targets=None,
                    topic=PULL,
                    request=request,
                    timeout=_PULL_SECONDS,
                    fl_ctx=fl_ctx,
                )
                for reply in (replies or {}).values():
                    said = reply.get_return_code()
                    if said == ReturnCode.OK and isinstance(reply.get(ANSWER), dict):
                        found: Mapping[str, Any] = reply[ANSWER]
                        if refusal := Refusal.read(found):
                            raise UpdateError(refusal.detail, reason=refusal.reason)
                        return found
            raise BaseMismatchError(
                f"the server gives no piece of version {version[:12]} ({said}); is its controller "
                "DareFedAvg?"
            )

        return lambda version, have: pull(lambda at: ask(version, have, at))

    # --- results ---------------------------------------------------------------------------

    def _result(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        turn: Turn | None = fl_ctx.get_prop(_TURN)
        if turn is None or shareable.get_return_code() != ReturnCode.OK:
            return shareable
        dxo = _dxo(shareable)
        try:
            differences = _is_difference(dxo)
            assert dxo is not None
            payloads, reply, local = turn.answer(dxo.data, differences=differences)
        except DareError as error:
            self.log_warning(fl_ctx, f"{error.reason}: {error}")
            payloads, reply = {}, Refusal.of(error, turn.receiver.have()).to_record()
        else:
            kept = {**fl_ctx.get_prop(_LOCAL, {}), **local}
            fl_ctx.set_prop(_LOCAL, kept, private=True, sticky=True)
        meta = {**(dxo.meta if dxo is not None else {}), REPLY: reply}
        return DXO(DataKind.WEIGHT_DIFF, payloads, meta).update_shareable(shareable)


def _dxo(shareable: Shareable) -> DXO | None:
    """The DXO in a message, None where there is none."""
    try:
        return from_shareable(shareable)
    except ValueError:
        return None


def _is_difference(dxo: DXO | None) -> bool:
    """Whether a result holds differences, not weights; raises `UpdateError` for neither."""
    kind = None if dxo is None else dxo.data_kind
    if kind not in (DataKind.WEIGHTS, DataKind.WEIGHT_DIFF):
        raise UpdateError(
            f"training returned {kind or 'no DXO'}; return weights or their differences: "
            "flare.send(FLModel(params=...))",
            reason="transport",
        )
    return bool(kind == DataKind.WEIGHT_DIFF)


def _site(fl_ctx: FLContext) -> Site:
    base = ConfigService.get_str_var(_BASE_WORD, SystemConfigs.RESOURCES_CONF)
    return Site(
        fl_ctx.get_identity_name(),
        cache_folder("versions"),
        Path(base).expanduser() if base else None,
    )

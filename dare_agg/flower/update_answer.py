"""A client's answer to an order to train: its update, what else it returned, and its receipt."""

from __future__ import annotations

from collections.abc import Mapping

from flwr.app import ConfigRecord, Context, RecordDict

from dare_agg.deploy.identities import load_identity
from dare_agg.errors import UpdateError
from dare_agg.flower.app_records import Record
from dare_agg.flower.records import DENSE_KEY, REPLY_KEY, STATISTICS_KEY, UPDATE_KEY, metrics_of
from dare_agg.flower.transport import pack
from dare_agg.rounds.client import ClientUpdate
from dare_agg.rounds.messages import Order, Receipt
from dare_agg.rounds.signing import reply_digest


def update_answer(
    update: ClientUpdate,
    order: Order,
    rest: Mapping[str, Record],
    have: str,
    context: Context,
    *,
    arrays_key: str = "",
) -> RecordDict:
    """What answers an order: the ``update``, the app's own records (``rest``) and the receipt.

    ``have`` is the version that this client holds, ``arrays_key`` the key under which the app
    returned its arrays. Signed where the node config names an identity. Raises `UpdateError` for
    an order without a plan.
    """
    plan = order.plan
    if plan is None:
        raise UpdateError(
            "an update answers an order to train; this one has no plan", reason="plan"
        )
    records: dict[str, Record] = {**rest, UPDATE_KEY: pack(update.blob)}
    if update.dense_blob is not None:
        records[DENSE_KEY] = pack(update.dense_blob)
    names: tuple[str, ...] = ()
    statistics = b""
    if update.statistics is not None:
        names, statistics = update.statistics.names, update.statistics.blob
        records[STATISTICS_KEY] = pack(statistics)
    signature = b""
    identity = context.node_config.get("identity")
    if identity is not None:
        metrics = metrics_of(RecordDict(dict(rest)))
        digest = reply_digest(plan.digest(), update.blob, update.dense_blob, metrics, statistics)
        signature = load_identity(str(identity)).sign(digest)
    receipt = Receipt.of(
        plan,
        have=have,
        delta_norm=update.delta_norm,
        delta_max=update.delta_max,
        share_above=update.share_above,
        statistics=names,
        arrays_key=arrays_key if arrays_key not in ("", order.arrays_key) else "",
        signature=signature,
    )
    records[REPLY_KEY] = ConfigRecord(receipt.to_record())
    return RecordDict(records)

"""What enters a party's training: the same for all who sign, and its local tensors its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from flwr.app import Array, ArrayRecord, Context, Message, RecordDict

from dare_agg.errors import ProtocolError
from dare_agg.flower.app_records import kept_local, settled_after
from dare_agg.flower.reception import offered_bases
from dare_agg.flower.records import OURS
from dare_agg.flower.transport import to_numpy, to_record
from dare_agg.rounds.same_code import package_fingerprint
from dare_agg.secure.training import training_digest
from dare_agg.vectors.model import Arrays
from dare_agg.vectors.patterns import compile_patterns, matches


def training_of(
    content: RecordDict,
    arrays: Mapping[str, Arrays],
    run_config: Mapping[str, Any],
    *,
    weighted_by_key: str,
    after: bytes = b"",
) -> bytes:
    """The digest of a training message: run config, the app's records, every tensor, the code.

    ``arrays`` are the model's, by the key the app knows them under, as they are before any
    local tensor of a party takes their place; ``after`` is the sum those come from. Records of
    this library are left out: the terms themselves say what they say.
    """
    apps = {name: record for name, record in content.items() if not name.startswith(OURS)}
    (key,) = arrays
    more = {
        name: to_numpy(record)
        for name, record in apps.items()
        if isinstance(record, ArrayRecord) and name != key
    }
    return training_digest(
        package=package_fingerprint(),
        run_config=run_config,
        words={"arrays": key, "weight": weighted_by_key, "after": after},
        records={
            name: dict(record.items())
            for name, record in apps.items()
            if not isinstance(record, ArrayRecord)
        },
        arrays={**more, **arrays},
    )


def own_tensors(
    msg: Message, local: Iterable[str], exclude: Iterable[str], context: Context, after: bytes
) -> dict[str, Array]:
    """This party's own values of the tensors that never leave it.

    A head that a server sends could be made to teach the body nothing, and so could one that
    it had only some parties train before. So all begin with what the sum ``after`` left them,
    or all anew with their own base's where that is b"". Raises `ProtocolError` (reason "local")
    where this party's come from another sum, or a tensor of ``exclude`` is not offered
    (`dare_agg.flower.offer_base`); buffers may be the server's, which the terms bind.
    """
    if after and settled_after(context) != after:
        raise ProtocolError(
            "the tensors that stay with this party come from another sum than those of the "
            "others; the server can let all begin anew",
            reason="local",
        )
    names, patterns = set(local), compile_patterns(exclude)
    own = {n: array for n, array in kept_local(context).items() if n in names} if after else {}
    missing = {name for name in names if matches(name, patterns)} - set(own)
    for arrays in offered_bases(msg, context) if missing else ():
        offered = {name: arrays[name] for name in missing if name in arrays}
        own.update(to_record(offered).items())
        missing -= set(offered)
    if missing:
        raise ProtocolError(
            f"{len(missing)} tensors stay with this party and it has none of its own "
            f"({sorted(missing)[0]!r}, …); register a function that makes them "
            "(dare_agg.flower.offer_base)",
            reason="local",
        )
    return own

"""Messages of Flower with records damaged at random: another value, kind, key or array."""

import random
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from dare_agg.flower.transport import PAYLOAD_STYPE
from simulations.bench.fuzzing import damaged

VALUES: tuple[Any, ...] = (
    True, False, -1, 0, 1, 7, 2**31, 2**63 - 1, -(2**63), 0.0, -1.5, float("nan"), float("inf"),
    "", "x" * 5000, "hello", "train", "reveal", "full", "versions", "a\nb\x1b[2J", "(a+)+$",
    "0" * 64,
    b"", b"\0" * 32, b"\xff" * 64, b"x" * 5000, [], [""], ["a"] * 5000, [1, 2], [0.5], [True],
    [b""], ["(", "a.*"],
)  # fmt: skip
DTYPES = ("float32", "float16", "uint8", "int64", "bfloat16", "object", "", "<U5", "float32,int8")


def damaged_content(rng: random.Random, content: RecordDict) -> RecordDict:
    """A copy of a message's content with one to three things changed."""
    new = RecordDict({key: _copied(record) for key, record in content.items()})
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        key = rng.choice([*new])
        record, kind = new[key], rng.randrange(12)
        if kind == 0:
            del new[key]
            if not new:
                return new
        elif kind == 1:
            new[key] = rng.choice((ConfigRecord(), MetricRecord(), ArrayRecord()))
        elif kind == 2:
            new[key] = _copied(rng.choice(list(new.values())))
        elif isinstance(record, ArrayRecord):
            _damage_arrays(rng, record)
        elif isinstance(record, ConfigRecord):
            _damage_config(rng, record)
        else:
            record["num-examples"] = rng.choice([v for v in VALUES if type(v) in (int, float)])
    return new


def _copied(record: Any) -> Any:
    if isinstance(record, ArrayRecord):
        return ArrayRecord(dict(record.items()), keep_input=True)
    return type(record)(dict(record.items()))


def _damage_config(rng: random.Random, record: ConfigRecord) -> None:
    key = rng.choice([*record, "another"])
    value, kind = record.get(key), rng.randrange(4)
    if kind == 0 and key in record:
        del record[key]
    elif kind == 1 and isinstance(value, bytes):
        record[key] = damaged(rng, value, lambda: value)
    elif kind == 2 and isinstance(value, str):
        record[key] = damaged(rng, value.encode(), lambda: b"x").decode("utf-8", "replace")
    else:
        record[key] = rng.choice(VALUES)


def _damage_arrays(rng: random.Random, record: ArrayRecord) -> None:
    if not record:
        return
    key = rng.choice([*record])
    array, kind = record[key], rng.randrange(6)
    data, shape, dtype, stype = array.data, list(array.shape), array.dtype, array.stype
    if kind == 0:
        del record[key]
        return
    if kind == 1:
        dtype = rng.choice(DTYPES)
    elif kind == 2:
        shape = rng.choice(([], [0], [1], [-1], [2**40], [2**62, 2**62, 0], [len(data)]))
    elif kind == 3:
        stype = rng.choice(("", "pickle", "numpy.ndarray", PAYLOAD_STYPE))
    elif kind == 4:
        key = rng.choice(("0", "1", "-1", "x", "", "head.w"))
    data = damaged(rng, data, lambda: array.data) if rng.random() < 0.5 else data
    record[key] = Array(dtype=dtype, shape=tuple(shape), stype=stype, data=data)

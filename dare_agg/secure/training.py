"""One digest of everything that enters a party's training, so that all train alike.

A server that tells one party to train and the others to stand still (a learning rate of 0, a
head of zeros) reads that one party's delta out of the "sum". So the terms of a sum hold this
digest, each party computes it from what it was itself given, and parties who were told
different things share no session.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Record = Mapping[str, object]


def training_digest(
    *,
    package: str,
    run_config: Record,
    words: Record,
    records: Mapping[str, Record],
    arrays: Mapping[str, Mapping[str, NDArray[np.generic]]],
) -> bytes:
    """SHA-256 over all that a server says to one who trains.

    ``package`` is the fingerprint of the code, ``run_config`` the run's settings, ``words``
    what the message says beside the app's own ``records`` (name → plain values), ``arrays``
    the model and any other arrays by record and name, those that stay local included. Equal
    values have equal digests, whatever the layout in memory and the order of names, but for
    arrays: code that takes them by position would train on others.
    """
    said = {
        "package": package,
        "run config": _plain(run_config),
        "words": _plain(words),
        "records": {name: _plain(record) for name, record in records.items()},
        "arrays": {
            name: [[key, *_array(array)] for key, array in group.items()]
            for name, group in arrays.items()
        },
    }
    text = json.dumps(said, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(b"dare-agg secure training 1\0" + text.encode()).digest()


def _plain(record: Record) -> dict[str, object]:
    """Values as JSON tells them apart: bytes as tagged text, numbers by kind."""
    return {key: _value(value) for key, value in record.items()}


def _value(value: object) -> object:
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, list | tuple):
        return [_value(item) for item in value]
    return value


def _array(array: NDArray[np.generic]) -> list[object]:
    data = np.asarray(array, order="C")
    little = data.astype(data.dtype.newbyteorder("<"), copy=False)
    return [little.dtype.str, list(data.shape), hashlib.sha256(little.tobytes()).hexdigest()]

"""A version store's header: which version its files hold, and what leads there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np

from dare_agg.errors import StateError
from dare_agg.files.state_file import parse_state, write_state

_FORMAT = 2


@dataclass(frozen=True)
class StoreHead:
    """The header but for the dense group's arrays.

    ``version`` is the chain's name, ``base`` the base's fingerprint, ``base_norm`` its delta
    group's ‖W‖, ``exponents`` the grid's. ``count`` rounds moved the model, the last of them was
    ``round``; ``moved`` parameters are elsewhere than in the base. ``steps`` are the numbers of the
    steps kept. The server step's vectors are ``moments``, in the files of ``place``.
    """

    version: str
    base: str
    layout: str
    exponents: tuple[int, ...]
    base_norm: float
    count: int = 0
    round: int = 0
    moved: int = 0
    steps: tuple[int, ...] = ()
    moments: tuple[str, ...] = ()
    place: int = 0


_KINDS = get_type_hints(StoreHead)


def write_head(path: Path, head: StoreHead, arrays: Mapping[str, np.ndarray]) -> None:
    """Put a header in place of the last one, as a whole; raises `StateError`."""
    write_state(path, arrays, {"format": _FORMAT, **asdict(head)})


def read_head(path: Path) -> tuple[StoreHead, dict[str, np.ndarray]]:
    """Read the header and the dense group's arrays; raises `StateError` for another file."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StateError(f"{path} cannot be read: {error.strerror or error}") from error
    return head_in(data, path)


def head_in(data: bytes, path: Path) -> tuple[StoreHead, dict[str, np.ndarray]]:
    """As `read_head`, from the file's bytes; ``path`` is for messages."""
    arrays, facts = parse_state(data, path)
    if facts.get("format") != _FORMAT:
        raise StateError(
            f"{path} is a store of format {facts.get('format')!r}, {_FORMAT} is known: run the "
            "dare-agg that the run was started with"
        )
    found: dict[str, Any] = {}
    for one in fields(StoreHead):
        value = facts.get(one.name)
        value = tuple(value) if isinstance(value, list) else value
        kind = _KINDS[one.name]
        if not isinstance(value, getattr(kind, "__origin__", kind)):
            raise StateError(f"{path} is a store without its {one.name!r}; it was left as it is")
        found[one.name] = value
    return StoreHead(**found), arrays

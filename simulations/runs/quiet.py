"""Flower's log kept out of a measurement's own output, for as long as that takes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_flower() -> Iterator[None]:
    """Errors alone are logged inside; also as a decorator."""
    from flwr.app import Context  # noqa: F401 (the first import sets the level)

    logger = logging.getLogger("flwr")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)

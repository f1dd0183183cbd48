"""The one error tree.

Every message names the offending value, the bound it broke and the remedy, on one
line. ``reason`` is a stable machine-readable slug; rejections of updates are logged
and counted under it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DareError(Exception):
    """Base of every error this library raises on purpose."""

    reason = "error"

    def __init__(self, message: str, *, reason: str | None = None) -> None:
        super().__init__(message)
        if reason is not None:
            self.reason = reason


class ConfigError(DareError):
    """A setting is unknown, out of bounds or contradicts another."""

    reason = "config"


class LayoutError(DareError):
    """Names, shapes or dtypes do not fit the layout."""

    reason = "layout"


class BaseMismatchError(DareError):
    """The base is not the one the update, version or plan was made for."""

    reason = "base"


class UpdateError(DareError):
    """An update is malformed or does not fit the round plan.

    ``reason`` is one of the slugs in `dare_agg.codec.update.REASONS`.
    """

    reason = "malformed"


class NonFiniteError(UpdateError):
    """A NaN or an infinity where a number was due."""

    reason = "non-finite"


class MergeError(DareError):
    """The models cannot be merged as asked."""

    reason = "merge"


class CheckpointError(DareError):
    """A checkpoint cannot be read or written."""

    reason = "checkpoint"


class BudgetError(DareError):
    """No drop rate and value format fit the budget."""

    reason = "budget"


class StateError(DareError):
    """Persisted state is missing, corrupt or cannot be written."""

    reason = "state"


class ProtocolError(DareError):
    """A secure-sum participant refuses to go on."""

    reason = "protocol"


class RunError(DareError):
    """A federated run did not reach its end."""

    reason = "run"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest of ``known``, else list all.

    >>> did_you_mean("densty", ["density", "gamma"])
    "; did you mean 'density'?"
    """
    options = sorted(known)
    close = difflib.get_close_matches(word, options, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(options)}" if options else ""

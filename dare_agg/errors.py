"""The one error tree.

Every message names the offending value, the bound it broke and the remedy, on one
line. ``reason`` is a stable machine-readable slug, a row of `REASONS`; rejections of updates
and refusals of parties are logged and counted under it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping

# Every reason there is: why an error was raised, an update rejected, a request refused.
REASONS: Mapping[str, str] = {
    # what is wrong, where nothing says more
    "error": "an error of the library",
    "config": "a setting is unknown, out of bounds or contradicts another",
    "layout": "other names or shapes",
    "tied": "copies of one tensor that training moved apart",
    "base": "another base, version or plan than it was made for",
    "base-missing": "a client has not the base that a run on disk starts from",
    "merge": "the models cannot be merged as asked",
    "checkpoint": "a checkpoint cannot be read or written",
    "quantised": "a model's weights are codes of a quantiser, not numbers",
    "format": "a text or header from outside is malformed or larger than what is read",
    "budget": "no drop rate and value format fit the budget",
    "privacy": "a privacy budget that is spent, lost, rolled back or another's",
    "state": "persisted state is missing, corrupt, or cannot be written",
    "protocol": "a participant of a secure sum does not go on",
    "run": "a federated run did not reach its end",
    "flower": "this Flower lacks a part that the library leans on",
    # bytes
    "truncated": "shorter than its header or its plan says",
    "trailing": "longer than its plan says",
    "oversized": "more bytes than the plan allows, seen before they are joined",
    "transport": "records that are no payload",
    "malformed": "not what it should be, or a field out of bounds",
    "checksum": "damaged on the way",
    "non-finite": "a NaN, an infinity or a magnitude that no training produces (above 2**20)",
    # another one than was agreed on
    "version": "another codec or protocol version",
    "package": "another copy of the library",
    "shape": "another number of parameters or survivors",
    "mask": "another mask key, rank, kind or drop rate",
    "values": "another value format",
    "context": "another run, round or client",
    "round": "a reply of another round",
    "plan": "another round plan, or one that cannot be read",
    # what a reply says
    "weight": "an absurd weight",
    "no-examples": "a client without data: it reports 0 examples and counts for nothing",
    "directions": "directions that no change of a Linear has",
    "statistics": "statistics that are missing or cannot be",
    "outlier": "a step before the merge left the update out",
    "quorum": "fewer updates than a robust rule needs",
    "left-out": "the app's own code left the update out",
    "signature": "the signature does not fit",
    # who replied, and when
    "duplicate": "a second one where one is due",
    "unknown-node": "a node that was not asked",
    "late": "no answer in time",
    "stale": "trained from a version that is older than what counts in a buffer",
    "mod": "the app answers without the client mod",
    "lost": "the node went away, or its message or reply did on the way",
    "worker": "the process that a simulated client ran in died, or Ray did",
    "client-error": "the app or its node failed; the detail holds the text",
    "refused": "refused for a reason that is none of these",
    # why a run ends
    "nodes": "too few nodes are online, or too few of them are members",
    "nobody-trained": "a round got too few updates that count",
    "push": "the SuperLink took no message",
    "superlink": "the SuperLink failed",
    # secure sums: the terms
    "terms": "terms that contradict themselves",
    "roster": "another roster, or a key or id outside it",
    "aggregate": "an aggregate the party does not take part in",
    "clip": "a larger clip than the party allows",
    "parties": "fewer parties than were agreed on",
    "groups": "another group, or number of groups, than the party takes part in",
    "threshold": "fewer parties than the threshold, or a lower threshold than allowed",
    "degree": "fewer neighbours than a party needs to be hidden among",
    "norm": "a delta too small to hide anybody",
    "training": "other settings, arrays or code enter the training than the terms say",
    "local": "tensors that stay with a party, and it has none of its own",
    # secure sums: the protocol
    "stage": "a step out of its order",
    "session": "of another session",
    "cohort": "other parties than those of the cohort",
    "own-keys": "a list of keys without one's own",
    "low-order": "a key of low order",
    "shares": "shares that do not open, are missing or wrong",
    "nonce": "a nonce that was not committed to",
    "overlap": "parties both alive and dead",
    "alive": "another set of parties alive than was signed",
    "second-cohort": "what has gone into a sum before",
    "words": "sums that no honest parties add up to",
    "result": "a party holds another result than the server",
}


# Of a message: what it names may come from anywhere and be of any length.
MOST_CHARACTERS = 800


# What programs send a terminal besides text: colours, cursor movements, titles.
_CONTROLS = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[\]PX^_].*?(?:\x1b\\|\x07|$)|[ -/]*[0-~])", re.DOTALL
)


def plain_line(text: str) -> str:
    """Return text as one printable line: no colours, nothing that moves a terminal's cursor.

    >>> plain_line("\\x1b[91mERROR\\x1b[0m:\\tno")
    'ERROR: no'
    """
    return _printable(_CONTROLS.sub("", text))


def _printable(text: str) -> str:
    return "".join(one if one.isprintable() else " " for one in text)


class DareError(Exception):
    """Base of every error this library raises on purpose.

    The message is one printable line of at most `MOST_CHARACTERS`, whatever it names.
    """

    reason = "error"

    def __init__(self, message: str, *, reason: str | None = None) -> None:
        if len(message) > MOST_CHARACTERS:
            message = f"{message[: MOST_CHARACTERS - 1]}…"
        message = _printable(message)
        super().__init__(message)
        if reason is not None:
            self.reason = reason


class ConfigError(DareError):
    """A setting is unknown, out of bounds or contradicts another."""

    reason = "config"


class LayoutError(DareError):
    """Names, shapes or dtypes do not fit the layout."""

    reason = "layout"


class ApartError(LayoutError):
    """Copies of one tensor that training moved apart: ``names`` are those that left the first."""

    reason = "tied"

    def __init__(self, message: str, names: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.names = tuple(names)


class BaseMismatchError(DareError):
    """The base is not the one the update, version or plan was made for."""

    reason = "base"


class BaseMissingError(DareError):
    """A client lacks the base of a run, or has another one."""

    reason = "base-missing"


class UpdateError(DareError):
    """An update is malformed or does not fit the round plan."""

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


class FormatError(DareError, ValueError):
    """A text or header from outside is malformed or larger than what is read.

    A `ValueError` too, so that a reader can say it in its own words.
    """

    reason = "format"


class BudgetError(DareError):
    """No drop rate and value format fit the budget."""

    reason = "budget"


class PrivacyError(DareError):
    """A privacy budget is spent, lost, rolled back or another's."""

    reason = "privacy"


class StateError(DareError):
    """Persisted state is missing, corrupt or cannot be written."""

    reason = "state"


class ProtocolError(DareError):
    """A secure-sum participant refuses to go on."""

    reason = "protocol"


class FlowerVersionError(DareError):
    """This Flower lacks a part that the library leans on, or is none it was made for."""

    reason = "flower"


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


def refuse(refusals: Iterable[tuple[object, str]], what: str = "") -> None:
    """Raise `ConfigError` for the first of (whether it holds, why it may not) that holds.

    ``what`` stands before why.
    """
    for bad, why in refusals:
        if bad:
            raise ConfigError(f"{what} {why}".strip())

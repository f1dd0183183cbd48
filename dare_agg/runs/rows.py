"""A row of a run's measurements, and the two files that every run folder has.

A row's keys stand here alone. What a row does not have reads as its default, keys of another
version are kept, so folders of older runs are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

from dare_agg.errors import FormatError, StateError
from dare_agg.files.json_text import parse_json

METRICS_FILE = "metrics.jsonl"  # a row of JSON a round
STATE_FILE = "run.json"  # status, config, fingerprints

# What is not below, not finite among it, counts as absent.
_MOST = 1e300

T = TypeVar("T")


class Key(Generic[T]):
    """A key of a row, and what a row reads as that has it not or of another kind."""

    def __init__(
        self,
        default: T,
        kinds: type | tuple[type, ...] = (int, float),
        key: str = "",
        each: type = object,
    ) -> None:
        self.default, self.kinds, self.key, self.each = default, kinds, key, each

    def __set_name__(self, owner: type, name: str) -> None:
        self.key = self.key or name

    @overload
    def __get__(self, row: None, owner: type) -> Key[T]: ...
    @overload
    def __get__(self, row: RunRow, owner: type) -> T: ...
    def __get__(self, row: RunRow | None, owner: type) -> Key[T] | T:
        if row is None:
            return self
        value: Any = row.values.get(self.key)
        fits = isinstance(value, self.kinds) and not isinstance(value, bool)
        if isinstance(value, int | float):
            fits = fits and -_MOST < value < _MOST
        elif isinstance(value, list | tuple):
            fits = fits and all(isinstance(item, self.each) for item in value)
        return value if fits else self.default


@dataclass(frozen=True)
class RunRow:
    """One round of one method; ``values`` is the row as the file has it, made by `of`.

    Byte counts are those of encoded payloads; ``_per_client`` ones are means, without the
    messages around them. ``update_bytes`` are the delta group's, ``dense_bytes`` the small
    dense group's. ``drop_rate`` is the mean over the clients, ``value_format`` those that they had;
    ``noise`` is that of what was not sent relative to ‖W‖, ``noise_of_change`` to the merged
    change. ``lora_errors`` say by module what the common rank of adapters could not hold
    of the mean of their products, ``lora_error`` the largest. ``secure_…`` are a secure run's
    alone, ``privacy_…`` a private one's: what is spent, and the clipping norm of the next round.
    ``robust`` says by which rule, and which clients were hardly heard; ``buffer``, of a run that
    waits for nobody, how old updates were, how many too old, how many clients train.
    ``by_client`` has what each client sent (`dare_agg.runs.by_client`), ``by_task`` an object for
    each client and task, where clients tell metrics task by task: see `dare_agg.runs.by_task`.
    """

    values: Mapping[str, Any]

    method = Key("run", str)
    round = Key(0)
    accuracy = Key[float | None](None)
    loss = Key[float | None](None)
    perplexity = Key[float | None](None)
    exact_match = Key[float | None](None, key="exact-match")
    train_loss = Key[float | None](None, key="train-loss")
    clients = Key(0)
    accepted = Key(0)
    rejected = Key[Sequence[Mapping[str, Any]]]((), (list, tuple), each=Mapping)
    away = Key[Sequence[str]]((), (list, tuple), each=str)
    refused = Key[Sequence[Mapping[str, Any]]]((), (list, tuple), each=Mapping)
    evaluate_failed = Key[Sequence[Mapping[str, Any]]]((), (list, tuple), each=Mapping)
    weights_cut = Key[Sequence[str]]((), (list, tuple), each=str)
    robust = Key[Mapping[str, Any]]({}, Mapping)
    buffer = Key[Mapping[str, Any]]({}, Mapping)
    by_client = Key[Sequence[Mapping[str, Any]]]((), (list, tuple), each=Mapping)
    by_task = Key[Sequence[Mapping[str, Any]]]((), (list, tuple), each=Mapping)
    parameters = Key[int | None](None)
    update_bytes_per_client = Key(0)
    dense_bytes_per_client = Key(0)
    statistics_bytes_per_client = Key(0)
    upload_bytes_per_client = Key(0)
    download_bytes_per_client = Key(0)
    upload_bytes = Key(0)
    download_bytes = Key(0)
    message_upload_bytes = Key(0)
    evaluate_download_bytes = Key(0)
    drop_rate = Key[float | None](None)
    value_format = Key[str | None](None, str)
    noise = Key[float | None](None)
    noise_of_change = Key[float | None](None)
    noise_warning = Key[str | None](None, str)
    survivors_per_element = Key[float | None](None)
    sign_conflict = Key[float | None](None)
    touched = Key[float | None](None)
    secure_lone_share = Key[float | None](None)
    secure_conflict_share = Key[float | None](None)
    secure_clipped_share = Key[float | None](None)
    secure_bits = Key[int | None](None)
    secure_word_bits = Key[int | None](None)
    secure_results = Key[int | None](None)
    privacy_epsilon = Key[float | None](None)
    privacy_delta = Key[float | None](None)
    privacy_noise = Key[float | None](None)
    privacy_next_norm = Key[float | None](None)
    lora_error = Key[float | None](None)
    lora_errors = Key[Mapping[str, float]]({}, Mapping)
    merged_norm = Key[float | None](None)
    delta_max = Key[float | None](None)
    share_above = Key[float | None](None)
    round_seconds = Key(0.0)
    seconds = Key(0.0)

    @classmethod
    def of(cls, method: str, round: int, metrics: Mapping[str, Any], **said: Any) -> RunRow:
        """Make a row: what clients measured, then keys by the names of this class, in order.

        No metric of a client's stands in for a key that is ours.
        """
        first = {cls.method.key: method, cls.round.key: round}
        keys = {vars(cls)[name].key: value for name, value in said.items()}
        return cls({**first, **metrics, **first, **keys})


def read_rows(path: Path, *, strict: bool = True) -> list[RunRow]:
    """Read a metrics file; a last line that is still being written is left out.

    Raises `StateError` for a line in the middle that is no row; not ``strict``, leaves it out.
    """
    lines = path.read_bytes().splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(parse_row(line))
        except FormatError as error:
            if strict and number < len(lines):
                raise StateError(
                    f"{path}: line {number} is not JSON ({error}); remove the line"
                ) from error
    return rows


def parse_row(line: str | bytes) -> RunRow:
    """Read one line of a metrics file; raises `FormatError`."""
    values = parse_json(line)
    if not isinstance(values, dict):
        raise FormatError("a row is no JSON object")
    return RunRow(values)


def sent_words(row: RunRow) -> str:
    """What clients sent of each value in a round: "p = 0.9, b1"; "" where the row does not say."""
    if row.drop_rate is None or row.value_format is None:
        return ""
    return f"p = {row.drop_rate:.4g}, {row.value_format}"

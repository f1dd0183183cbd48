"""The table of secure aggregates, and what a run may ask of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from dare_agg.secure.aggregate import Aggregate
from dare_agg.secure.mean import MEAN
from dare_agg.secure.private import PRIVATE_MEAN
from dare_agg.secure.ties import TIES
from dare_agg.secure.wudi import WUDI

AGGREGATES: Mapping[str, Aggregate] = {row.name: row for row in (MEAN, TIES, WUDI, PRIVATE_MEAN)}


class SecureMethod(NamedTuple):
    """What is summed, how the sums are read, and whether parties may weigh by examples."""

    aggregate: str
    rule: str
    weighed: bool


SECURE_METHODS: Mapping[str, SecureMethod] = {
    rule.method: SecureMethod(row.name, word, rule.weighed)
    for row in AGGREGATES.values()
    for word, rule in row.rules.items()
    if rule.method
}

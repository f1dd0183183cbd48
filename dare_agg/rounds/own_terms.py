"""What each client is given of its own: by the rounds' choice, its budget or the app."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dare_agg.codec.budget import ClientTerms, UploadBudget
from dare_agg.codec.payload import payload_bytes
from dare_agg.codec.update_header import HEADER_BYTES
from dare_agg.errors import ConfigError
from dare_agg.rounds.auto import within
from dare_agg.rounds.auto_state import AutoState
from dare_agg.rounds.choosing import Chooser
from dare_agg.rounds.directions import most_bytes
from dare_agg.rounds.messages import Hello
from dare_agg.rounds.terms import UpdateTerms
from dare_agg.vectors.model import GlobalModel


@dataclass(frozen=True)
class OwnTerms:
    """Who chooses a client's drop rate and value format; None where nobody does.

    ``client_terms`` and ``upload_budget`` are words of the run, ``chooser`` is there where rounds
    choose. Raises `ConfigError` where two words choose.
    """

    client_terms: Callable[[Hello], ClientTerms | None] | None = None
    upload_budget: UploadBudget | None = None
    chooser: Chooser | None = None

    def __post_init__(self) -> None:
        if self.client_terms is not None and self.upload_budget is not None:
            raise ConfigError("client_terms and upload_budget both choose; give one of them")
        if self.chooser is not None:
            limits = {"upload_budget": self.upload_budget, "client_terms": self.client_terms}
            named = (name for name, value in limits.items() if value is not None)
            self.chooser.limit = next(named, "")

    def of(
        self, hello: Hello, model: GlobalModel, terms: UpdateTerms, state: AutoState
    ) -> ClientTerms | None:
        """The terms of one client in a round of ``model``, None for those of all."""
        wanted, layout = None, model.groups.layout
        if self.chooser is not None:
            wanted = self.chooser.wanted(layout, state)
        if self.upload_budget is None:
            return (self.client_terms(hello) if self.client_terms else None) or wanted
        ref = model.ref
        dense = ref.dense_size and HEADER_BYTES + payload_bytes(terms.dense_values, ref.dense_size)
        if terms.directions:
            dense += most_bytes(terms, layout)
        allowed = self.upload_budget.terms(ref.size, dense, hello.uplink_kbit_s, mask=terms.mask)
        return allowed if wanted is None else within(wanted, allowed, ref.size)

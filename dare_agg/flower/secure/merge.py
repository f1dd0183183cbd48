"""A one-shot merge of models that parties already have: one secure sum, no training.

The base is public: server and parties each read their own copy. The server learns the sums
and writes base + merged delta; each party gets the merged delta and puts its own head
on (``merged-path`` in its node config).
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from dare_agg.errors import ConfigError, DareError, RunError
from dare_agg.flower.exchange import exchange, online_nodes
from dare_agg.flower.secure.records import (
    RESULT,
    Begin,
    Merged,
    Step,
    answer_record,
    content_of,
)
from dare_agg.flower.secure.session import (
    STAGE_SECONDS,
    SessionLog,
    meet_parties,
    query,
    run_session,
    warn_of_clipping,
    waves,
)
from dare_agg.flower.transport import message_bytes
from dare_agg.flower.waiting import Waiting
from dare_agg.rounds.messages import one_line
from dare_agg.secure.own_model import open_public
from dare_agg.secure.result import merged_sum
from dare_agg.secure.roster import Roster
from dare_agg.secure.server import SecureServer
from dare_agg.secure.settings import SecureSettings
from dare_agg.vectors.layout import FloatVector, Layout, fingerprint

LOG = logging.getLogger("flwr")


@dataclass(frozen=True)
class SecureMerge:
    """The merged model over ``layout`` and everything measured, as plain values."""

    layout: Layout
    merged: FloatVector
    measurements: dict[str, Any]


def secure_merge(
    grid: Grid,
    base: Path,
    roster: Roster,
    settings: SecureSettings,
    *,
    run: str,
    model: str = "",
    exclude: Sequence[str] = (),
    parties: int = 0,
    out: Path | None = None,
    node_timeout: float = 600.0,
    stage_seconds: float = STAGE_SECONDS,
) -> SecureMerge:
    """Merge the parties' models with the secure sum of ``settings``.

    ``base`` is the server's copy, ``model`` the run's word for it where parties find it by
    themselves. Waits for ``parties`` members (at least more than half of the roster); where fewer
    can take part it ends before anyone has put data in, so that a wrong file at one party does
    not use up the models of the others. Writes the merged model to ``out``. Raises `RunError`
    when too few members come, `ProtocolError` when too few can begin or stay.
    """
    public = open_public(base, exclude)
    layout = public.layout
    needed = max(parties, settings.fewest(roster))
    began = time.monotonic()
    nodes = _members(grid, roster, needed, node_timeout, stage_seconds)
    terms = settings.terms(
        run=f"{run}-{os.urandom(8).hex()}",
        round_number=0,
        roster=roster,
        cohort=sorted(nodes),
        base=public.fingerprint,
        layout=layout.fingerprint,
        size=layout.size,
        exclude=tuple(exclude),
        model=layout,
    )
    server, log = SecureServer(terms, roster), SessionLog()

    def first(node: int) -> Message:
        begin = Begin(model=model, terms=terms.encode())
        return query(content_of(begin), node, stage_seconds)

    sums = run_session(
        grid,
        server,
        nodes,
        first,
        log,
        first_seconds=stage_seconds,
        stage_seconds=stage_seconds,
        model=model,
        begin_with=needed,
    )
    found = merged_sum(sums, terms, server.mask, settings.rule, settings.scaling, layout)
    measured = found.measured
    warn_of_clipping(measured, settings.clip)
    merged = public.vector()
    merged += found.vector()
    if out is not None:
        public.write(out, merged)
    alive = {party: nodes[party] for party in server.alive}
    told = _tell(grid, alive, terms.session, found.message(), model, log, stage_seconds)
    name = fingerprint(layout, merged)
    for party, theirs in told.items():
        if theirs != name:
            log.reject(party, "result", f"it holds {one_line(theirs, 12)}, the server {name[:12]}")
    return SecureMerge(
        layout,
        merged,
        {
            "method": f"secure-{settings.method}",
            "fingerprint": name,
            "base": terms.base,
            "parties": [roster[party].name for party in server.alive],
            "cohort": [roster[party].name for party in terms.cohort],
            "result_at": [roster[party].name for party in sorted(told) if told[party] == name],
            "parameters": layout.size,
            "words": terms.words,
            "directions": terms.directions,
            "sketch": terms.sketch,
            "bits": terms.quantiser.bits,
            "word_bits": terms.quantiser.word_bits,
            "drop_rate": terms.drop_rate.p,
            "scaling": settings.scaling,
            "lone_share": measured.lone_share,
            "conflict_share": measured.conflict_share,
            "clipped_share": measured.clipped_share,
            "upload_bytes": [log.upload[party] for party in server.alive],
            "download_bytes": [log.download[party] for party in server.alive],
            "rejected": [{**asdict(r), "name": roster[r.client].name} for r in log.rejections],
            "stage_seconds": dict(log.seconds),
            "seconds": time.monotonic() - began,
        },
    )


def _members(
    grid: Grid, roster: Roster, needed: int, timeout: float, stage_seconds: float
) -> dict[int, int]:
    """Wait until enough members of the roster are online; party → node."""
    if needed > len(roster.members):
        raise ConfigError(
            f"{needed} parties are waited for; roster {roster.name!r} has {len(roster.members)}"
        )
    until = time.monotonic() + timeout
    parties: dict[int, int] = {}
    problems: dict[int, str] = {}
    waiting = Waiting(needed)
    while True:
        online = online_nodes(grid)
        new = [n for n in online if n not in parties.values() and n not in problems]
        if len(online) >= needed and new:
            found, bad = meet_parties(grid, new, roster, stage_seconds)
            parties.update(found)
            problems.update(bad)
        here = {party: node for party, node in parties.items() if node in online}
        if len(here) >= needed:
            return dict(sorted(here.items()))
        refused = len(online) >= needed and all(node in problems for node in online)
        if refused or time.monotonic() > until:
            why = f"; {next(iter(problems.values()))}" if problems else ""
            raise RunError(
                f"{len(here)} of the {needed} parties needed are online"
                + (
                    f", {len(online)} nodes refused{why}"
                    if refused
                    else f" after {timeout:g} s{why}"
                ),
                reason="nodes",
            )
        waiting.say(len(here), sum(node in problems for node in online))
        time.sleep(0.5)


def _tell(
    grid: Grid,
    nodes: dict[int, int],
    session: bytes,
    message: bytes,
    model: str,
    log: SessionLog,
    seconds: float,
) -> dict[int, str]:
    """Send the merged survivors to who took part; party → fingerprint of what it then holds."""
    parties = list(nodes)
    told: dict[int, str] = {}
    for some in waves(parties, len(message)):
        content = {
            p: content_of(Step(stage=RESULT, session=session, model=model), message) for p in some
        }
        messages = [query(content[p], nodes[p], seconds) for p in some]
        for party in some:
            log.download[party] += message_bytes(content[party])
        for index, reply in exchange(grid, messages, seconds):
            party = some[index]
            try:
                told[party] = Merged.read(answer_record(reply)).merged
            except DareError as error:
                log.reject(party, error.reason, one_line(error))
    for party in parties:
        if party not in told and party not in {r.client for r in log.rejections}:
            log.reject(party, "late", "it did not take the result in time")
    return told

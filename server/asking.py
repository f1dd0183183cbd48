"""Questions to nodes before the first round."""

from __future__ import annotations

import logging
import time

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from dare_agg.errors import RunError
from dare_agg.flower.exchange import ROOM, exchange, online_nodes, went_away
from dare_agg.flower.limits import ReplyLimit
from dare_agg.flower.records import said_by
from dare_agg.flower.waiting import Waiting
from dare_agg.merge.methods import find_method
from dare_agg.rounds.messages import one_line
from server.compared import METHODS
from server.config import RunConfig

LOG = logging.getLogger("flwr")
# Remarks on data, of one node and of all, that are shown.
_MOST_NOTES = 8
# What a query asks a node to do, in words.
_ASKED = {"describe": "describe its data", "initial": "make the first model"}


def ask(
    grid: Grid,
    nodes: list[int],
    what: str,
    config: ConfigRecord,
    timeout: float,
    limit: ReplyLimit = ROOM,
) -> list:
    """Send a query to nodes and return the replies' contents, in the order of the nodes.

    A node that is lost is asked again when it is back. Raises `RunError` naming the first node
    that failed or stayed silent.
    """
    until = time.monotonic() + timeout
    contents: dict[int, RecordDict] = {}
    while len(contents) < len(nodes) and (left := until - time.monotonic()) > 0:
        online = set(online_nodes(grid))
        asked = [node for node in nodes if node not in contents and node in online]
        if not asked:
            time.sleep(0.5)
            continue
        messages = [
            Message(RecordDict({"config": config}), node, f"query.{what}", ttl=left + 60)
            for node in asked
        ]
        for index, reply in exchange(grid, messages, left, limit):
            if went_away(reply):
                continue
            if reply.has_error():
                did = _ASKED.get(what, what)
                raise RunError(f"node {asked[index]} could not {did}: {said_by(reply)}")
            contents[asked[index]] = reply.content
    for node in nodes:
        if node not in contents:
            did = _ASKED.get(what, what)
            raise RunError(f"node {node} did not {did} within {timeout:g} s; check its log")
    return [contents[node] for node in nodes]


def wait_for_nodes(grid: Grid, config: RunConfig) -> list[int]:
    """Return the nodes online once there are enough; raises `RunError` after node-timeout."""
    until = time.monotonic() + config.node_timeout
    waiting = Waiting(config.min_clients)
    while True:
        nodes = sorted(online_nodes(grid))
        if len(nodes) >= config.min_clients:
            return nodes
        if time.monotonic() > until:
            raise RunError(
                f"{len(nodes)} of {config.min_clients} clients are online after "
                f"{config.node_timeout:g} s; start more SuperNodes or lower min-clients",
                reason="nodes",
            )
        waiting.say(len(nodes))
        time.sleep(0.5)


def agree_on_labels(grid: Grid, config: RunConfig) -> tuple[str, ...]:
    """Return the run's labels: those of the config, else all that any node's data has.

    Where heads stay local (``exclude`` covers them), every node keeps its own labels. Raises
    `RunError` where the nodes' task refuses what the run's methods need.
    """
    nodes = wait_for_nodes(grid, config)
    settled = bool(config.labels) or any("head" in pattern for pattern in config.exclude)
    needs = _needs(config)
    if settled:
        nodes = nodes[:1] if needs else []
    found: set[str] = set()
    asked = ConfigRecord({"needs": needs})
    notes: dict[str, None] = {}
    for content in ask(grid, nodes, "describe", asked, config.node_timeout):
        described = content["description"]
        found.update(str(name) for name in described["labels"])
        said = described.get("notes")
        if isinstance(said, list):
            notes |= dict.fromkeys(one_line(note) for note in said[:_MOST_NOTES])
    for note in list(notes)[:_MOST_NOTES]:
        LOG.warning("a client's data: %s", note)
    return config.labels if settled else tuple(sorted(found))


def _needs(config: RunConfig) -> list[str]:
    """What the run's methods need of a task besides ``train``: a head alone, statistics."""
    found: set[str | None] = set()
    for row in map(METHODS.__getitem__, config.methods):
        found |= {row.train, find_method(row.words["method"]).statistics}
    return sorted(need for need in found if need)

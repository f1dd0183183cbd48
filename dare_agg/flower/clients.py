"""Who takes part: meeting nodes, naming them, sampling them.

Flower's node ids differ from run to run, so each new node is asked once for its name (the
partition id in a simulation). Clients sorted by name are the same clients in every run, and
so are the samples drawn from them. Asking also finds a node that runs other code before
anything trains.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from dare_agg.codec.derive import derive_key
from dare_agg.codec.update import CODEC_VERSION
from dare_agg.errors import RunError
from dare_agg.flower.exchange import exchange, online_nodes, went_away
from dare_agg.flower.records import (
    ASK_HELLO,
    ORDER_KEY,
    REPLY_KEY,
    Hello,
    one_line,
    read_config,
    read_hello,
    read_refusal,
)
from dare_agg.rounds.same_code import package_fingerprint

LOG = logging.getLogger("flwr")
WAIT_SECONDS = 1.0


@dataclass(frozen=True)
class Client:
    """A node that can take part."""

    node: int
    hello: Hello


@dataclass
class Clients:
    """The nodes met so far; those refused are asked no second time, those lost meanwhile are.

    ``facts`` and ``config`` go with the question who they are: the base of the run, and the
    app's own config, from which a client may make the base itself. With ``identities`` (name
    → public key) only those clients take part.
    """

    downlink: str = "full"
    facts: Mapping[str, str | list[str]] = field(default_factory=dict)
    config: ConfigRecord | None = None
    identities: Mapping[str, str] = field(default_factory=dict)
    hello_timeout: float = 600.0
    known: dict[int, Client] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)

    def wait(self, grid: Grid, minimum: int, timeout: float) -> list[Client]:
        """Return the clients that are online, by name, once there are ``minimum`` of them.

        Raises `RunError` after ``timeout`` seconds (reason "nodes"), and at once when every
        node that is online has refused (reason "refused").
        """
        deadline = time.monotonic() + timeout
        said = -1
        while True:
            online = online_nodes(grid)
            new = [node for node in online if node not in self.known and node not in self.refused]
            left = max(1.0, deadline - time.monotonic())
            self._meet(grid, new, min(left, self.hello_timeout))
            ready = [self.known[node] for node in online if node in self.known]
            if len(ready) >= minimum:
                return sorted(ready, key=lambda client: (*client.hello.order(), client.node))
            refusals = [self.refused[node] for node in online if node in self.refused]
            if refusals and len(refusals) == len(online) and len(online) >= minimum:
                raise RunError(
                    f"all {len(online)} nodes refused to take part: {refusals[0]}",
                    reason="refused",
                )
            if time.monotonic() >= deadline:
                why = f"; {len(refusals)} refused: {refusals[0]}" if refusals else ""
                raise RunError(
                    f"{len(ready)} of the {minimum} clients needed are online after {timeout:g} s"
                    f"{why}; start more SuperNodes, or lower min_available_nodes and "
                    "min_train_nodes",
                    reason="nodes",
                )
            if len(ready) != said:
                LOG.info("waiting for clients: %d of %d are online", len(ready), minimum)
                said = len(ready)
            time.sleep(min(WAIT_SECONDS, max(0.01, deadline - time.monotonic())))

    def _meet(self, grid: Grid, nodes: Sequence[int], timeout: float) -> None:
        """Ask each node who it is."""
        order = ConfigRecord(
            {
                "ask": ASK_HELLO,
                "codec": CODEC_VERSION,
                "package": package_fingerprint(),
                "downlink": self.downlink,
                **self.facts,
            }
        )
        content = {ORDER_KEY: order, **({"config": self.config} if self.config else {})}
        messages = [
            Message(RecordDict({**content}), node, MessageType.TRAIN, ttl=timeout + 60)
            for node in nodes
        ]
        for index, reply in exchange(grid, messages, timeout):
            node = nodes[index]
            if went_away(reply):
                LOG.info("node %d went away when asked who it is", node)
                continue
            problem = self._read(node, reply)
            if problem:
                self.refused[node] = problem
                LOG.warning("node %d does not take part: %s", node, problem)

    def _read(self, node: int, reply: Message) -> str | None:
        """Learn the client's name; returns what is wrong with it, or None."""
        if reply.has_error():
            lines = (reply.error.reason or "no text").strip().splitlines()
            return (
                f"it failed to say who it is ({one_line(lines[-1] if lines else 'no text')}); is "
                "dare_mod in ClientApp(mods=[dare_mod])?"
            )
        record = read_config(reply.content, REPLY_KEY)
        if record is None:
            return "its app does not answer; put dare_mod into ClientApp(mods=[dare_mod])"
        refusal = read_refusal(record)
        if refusal is not None:
            return f"{refusal[0]}: {refusal[1]}"
        hello = read_hello(record, node)
        if self.identities and hello.name not in self.identities:
            return (
                f"signature: client {hello.name!r} is not among the {len(self.identities)} known "
                "identities; add its public key, or set client-name in its --node-config"
            )
        self.known[node] = Client(node, hello)
        return None


def sample(clients: Sequence[Client], count: int, secret: bytes, round_number: int) -> list[Client]:
    """Draw ``count`` clients, the same for the same secret, round and names; keeps order."""
    if count >= len(clients):
        return list(clients)
    keys = [derive_key(secret, "sample", round_number, index) for index in range(len(clients))]
    drawn = sorted(range(len(clients)), key=lambda index: keys[index])[:count]
    return [clients[index] for index in sorted(drawn)]

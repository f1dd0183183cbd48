"""Who takes part: meeting nodes, naming them, sampling them.

Flower's node ids differ from run to run, so each new node is asked once for its name (the
partition id in a simulation). Clients sorted by name are the same clients in every run, and
so are the samples drawn from them. Asking also finds a node that runs other code before
anything trains.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from dare_agg.codec.derive import derive_key
from dare_agg.errors import DareError, RunError
from dare_agg.flower.exchange import exchange, online_nodes, went_away
from dare_agg.flower.records import failure_of, read_answer, way_out, worker_died
from dare_agg.flower.waiting import Waiting
from dare_agg.rounds.draws import drawn_places
from dare_agg.rounds.messages import Hello, Refusal, one_line

LOG = logging.getLogger("flwr")
WAIT_SECONDS = 1.0
# A worker may be killed for what another one took; one that always dies does so by itself.
MOST_DEATHS = 3


@dataclass(frozen=True)
class Client:
    """A node that can take part."""

    node: int
    hello: Hello


@dataclass(frozen=True)
class Draw:
    """How the clients of an exchange are drawn: a share of those online, at least ``least``.

    ``what`` they are asked is also the label of the key they are drawn by.
    """

    what: str
    round: int
    secret: bytes
    fraction: float
    least: int


@dataclass
class Clients:
    """The nodes met so far; those refused are asked no second time, those lost meanwhile are.

    With ``identities`` (name → public key) only those clients take part. ``online`` are the nodes
    that were when last looked, ``deaths`` the workers that died of the question who they are.
    """

    identities: Mapping[str, str] = field(default_factory=dict)
    hello_timeout: float = 600.0
    known: dict[int, Client] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)
    online: list[int] = field(default_factory=list)
    deaths: Counter[int] = field(default_factory=Counter)

    def choose(
        self, grid: Grid, hello: RecordDict, drawn: Draw, *, least: int, timeout: float
    ) -> list[Client]:
        """Draw the clients of a round once ``least`` are online; raises as `wait`."""
        ready = self.wait(grid, hello, max(least, drawn.least, 1), timeout)
        count = max(int(len(ready) * drawn.fraction), drawn.least, 1)
        chosen = sample(ready, count, derive_key(drawn.secret, drawn.what, length=32), drawn.round)
        LOG.info("%s: %d of %d clients", drawn.what, len(chosen), len(ready))
        return chosen

    def wait(self, grid: Grid, hello: RecordDict, minimum: int, timeout: float) -> list[Client]:
        """Return the clients that are online, by name, once there are ``minimum`` of them.

        ``hello`` asks new ones who they are.

        Raises `RunError` after ``timeout`` seconds (reason "nodes"), and at once when every
        node that is online has refused (reason "refused").
        """
        deadline = time.monotonic() + timeout
        waiting = Waiting(minimum)
        while True:
            online = self.online = online_nodes(grid)
            new, left = self.unmet(), max(1.0, deadline - time.monotonic())
            left = min(left, self.hello_timeout)
            messages = [self.question(hello, node, left) for node in new]
            for index, reply in exchange(grid, messages, left):
                self.hear(new[index], reply)
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
            waiting.say(len(ready), len(refusals))
            time.sleep(min(WAIT_SECONDS, max(0.01, deadline - time.monotonic())))

    def called(self, node: int) -> str:
        """The name of a node that was met, else its number."""
        client = self.known.get(node)
        return client.hello.name if client is not None else f"node {node}"

    def away(self) -> list[str]:
        """Names of the clients that were met and are no longer online, as whatever node."""
        here = {client.hello.name for node, client in self.known.items() if node in self.online}
        return sorted({client.hello.name for client in self.known.values()} - here)

    def turned_away(self) -> list[dict[str, str]]:
        """The nodes online that do not take part, each with why not."""
        return [
            {"name": f"node {node}", "detail": self.refused[node]}
            for node in self.online
            if node in self.refused
        ]

    def unmet(self) -> list[int]:
        """Of the nodes that were online when last looked, those not asked who they are."""
        return [n for n in self.online if n not in self.known and n not in self.refused]

    def question(self, hello: RecordDict, node: int, timeout: float) -> Message:
        """The message that asks a node who it is."""
        # Apps need have no function for queries: one asked by that name would reach no mod.
        content = RecordDict(dict(hello.items()))
        return Message(content, node, MessageType.TRAIN, ttl=timeout + 60)

    def hear(self, node: int, reply: Message) -> None:
        """Take a node's answer to the question who it is."""
        died = worker_died(reply)
        self.deaths[node] += died
        if went_away(reply) or (died and self.deaths[node] < MOST_DEATHS):
            LOG.info("node %d went away when asked who it is", node)
            return
        problem = self._read(node, reply)
        if problem:
            self.refused[node] = problem
            LOG.warning("node %d does not take part: %s", node, problem)

    def _read(self, node: int, reply: Message) -> str | None:
        """Learn the client's name; returns what is wrong with it, or None."""
        if reply.has_error():
            reason, detail = failure_of(reply)
            said = f"it failed to say who it is ({reason}: {detail})"
            mods = (
                "; either its app lacks dare_mod, or a mod before dare_mod needs trained arrays or "
                "metrics, which are not there: list dare_mod first, ClientApp(mods=[dare_mod, …])"
            )
            return said if reason != "client-error" or way_out(reply) else said + mods
        try:
            answer = read_answer(reply.content, Hello)
        except DareError as error:
            return f"{error.reason}: {one_line(error)}"
        if answer is None:
            return "its app does not answer; put dare_mod into ClientApp(mods=[dare_mod])"
        if isinstance(answer, Refusal):
            return f"{answer.reason}: {answer.detail}"
        # A client without a name of its own goes by its node id.
        hello = replace(answer, name=answer.name or str(node))
        if self.identities and hello.name not in self.identities:
            return (
                f"signature: client {hello.name!r} is not among the {len(self.identities)} known "
                "identities; add its public key, or set client-name in its --node-config"
            )
        self.known[node] = Client(node, hello)
        return None


def sample(clients: Sequence[Client], count: int, secret: bytes, round_number: int) -> list[Client]:
    """Draw ``count`` clients, the same for the same secret, round and names; keeps order."""
    return [clients[place] for place in drawn_places(len(clients), count, secret, round_number)]

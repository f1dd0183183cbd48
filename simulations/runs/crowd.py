"""Clients that come and go: who is there at which time of the day, drawn from a seed."""

from __future__ import annotations

import math

import numpy as np

DAY = 86400.0


class Crowd:
    """So many clients, each there for ``stay`` seconds on average and then ``away`` so long.

    Both times are exponential; by day fewer come than by night. Those who are ``present`` can be
    drawn. Whoever drives it calls `come` and `leave` at the times that they and `first` return.
    """

    def __init__(self, clients: int, stay: float, away: float, seed: int) -> None:
        self._draw = np.random.default_rng([seed, 30])
        self._stay, self._away = stay, away
        self.clients = clients
        self.present: list[int] = []
        self._places: dict[int, int] = {}

    def first(self) -> list[tuple[float, int, bool]]:
        """For each client when it first comes, or leaves where it is there: seconds, who, comes."""
        share = self._stay / (self._stay + self._away)
        found = []
        for client in range(self.clients):
            here = self._draw.random() < share
            if here:
                self._enter(client)
            mean = self._stay if here else self._away
            found.append((float(self._draw.exponential(mean)), client, not here))
        return found

    def come(self, client: int, now: float) -> tuple[float, bool]:
        """Let a client come, or put it off; seconds until its next event, and whether it came."""
        likely = 0.5 + 0.4 * math.cos(2 * math.pi * now / DAY)
        if self._draw.random() >= likely:
            return float(self._draw.exponential(self._away)), False
        self._enter(client)
        return float(self._draw.exponential(self._stay)), True

    def leave(self, client: int) -> float:
        """Let a client leave; seconds until it may come again."""
        place, last = self._places.pop(client), self.present.pop()
        if last != client:
            self.present[place] = last
            self._places[last] = place
        return float(self._draw.exponential(self._away))

    def drawn(self) -> int:
        """One of those who are there, each as likely."""
        return self.present[int(self._draw.integers(len(self.present)))]

    def is_here(self, client: int) -> bool:
        """Whether a client is there."""
        return client in self._places

    def _enter(self, client: int) -> None:
        self._places[client] = len(self.present)
        self.present.append(client)

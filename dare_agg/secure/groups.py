"""Secure sums over groups of a roster: one whole protocol for each, and the sums side by side.

A server that sees one sum cannot tell who spoils it. Where it sees one of each group, a robust
rule compares the groups, and each party is hidden among those of its own (`division`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from dare_agg.codec.mask import Mask
from dare_agg.errors import ProtocolError
from dare_agg.secure.aggregate import Sums
from dare_agg.secure.roster import Roster
from dare_agg.secure.server import SecureServer

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class GroupSum:
    """What one group came to: its number, its server, at its end, and the sums."""

    group: int
    server: SecureServer = field(repr=False)
    sums: Sums = field(repr=False)


@dataclass
class GroupedServer:
    """The secure sums of a round's groups, stage by stage, as `SecureServer` is one.

    A group whose sum ends (too few stay, a malformed sum) is out, and the others go on while there
    are ``least`` of them; with one group its error is raised. ``lost`` says why a group is out,
    from the start where too few of it are here. Raises `ProtocolError` (reason "threshold") where
    too few groups begin.
    """

    servers: Mapping[int, SecureServer]
    least: int = 1
    lost: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._enough()

    @property
    def roster(self) -> Roster:
        """The roster of all groups."""
        return next(iter(self.servers.values())).roster

    @property
    def mask(self) -> Mask:
        """The one mask of all groups."""
        return next(iter(self._left().values())).mask

    @property
    def alive(self) -> tuple[int, ...]:
        """Parties in the sums of the groups that are left, ascending."""
        return tuple(sorted(p for server in self._left().values() for p in server.alive))

    def of(self, party: int) -> SecureServer:
        """The sum that a party takes part in. Raises `ProtocolError` (reason "cohort")."""
        for server in self.servers.values():
            if party in server.terms.members:
                return server
        raise ProtocolError(f"party {party} is in no group of this round", reason="cohort")

    def _left(self) -> dict[int, SecureServer]:
        return {group: one for group, one in self.servers.items() if group not in self.lost}

    def _out(self, group: int, error: ProtocolError) -> None:
        if len(self.servers) == 1:
            raise error
        self.lost[group] = error.reason
        LOG.warning("secure sum: group %d is out: %s", group, error)

    def _enough(self) -> None:
        left = len(self._left())
        if left < self.least:
            raise ProtocolError(
                f"{left} of {left + len(self.lost)} groups are left ("
                + ", ".join(f"group {group}: {why}" for group, why in sorted(self.lost.items()))
                + f"); the rule needs {self.least}: the model stays as it is",
                reason="threshold",
            )

    def close(self) -> dict[int, bytes]:
        """End the stage of each group; the next request of all parties that still take part.

        Raises `ProtocolError` (reason "threshold") when too few groups are left.
        """
        requests: dict[int, bytes] = {}
        for group, server in self._left().items():
            try:
                requests |= server.close()
            except ProtocolError as error:
                self._out(group, error)
        self._enough()
        return requests

    def finish(self) -> tuple[GroupSum, ...]:
        """The sums of the groups that are left.

        Raises `ProtocolError` (reason "threshold") when they are too few.
        """
        found = []
        for group, server in self._left().items():
            try:
                found.append(GroupSum(group, server, server.finish()))
            except ProtocolError as error:
                self._out(group, error)
        self._enough()
        return tuple(found)

"""Who is asked in the exchange that goes on, and who has answered: what a watcher shows.

A strategy's own loop says it; whoever sets ``tell`` hears of each exchange as it begins, of
answers as they come, and of its end. Nothing of it has part in what is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

# Of more clients not each answer is told, but each so many parts of all, and the last ones.
_PARTS = 32
_MOST_NAMES = 16


@dataclass(frozen=True)
class Stand:
    """How an exchange stands.

    ``phase`` is "round" (it begins), "train", "merge", "evaluate" or "end" (of the run's rounds);
    ``waiting`` names some of those who have not answered, all where they are few.
    """

    phase: str
    round: int
    rounds: int
    asked: int = 0
    answered: int = 0
    waiting: tuple[str, ...] = ()


@dataclass
class Standing:
    """Follows a run's exchanges for `tell`; ``name`` says what a node is called.

    With ``names`` false no client is named, where who takes part is a secret of the run.
    """

    name: Callable[[int], str]
    tell: Callable[[Stand], None] | None = None
    names: bool = True
    round: int = 0
    rounds: int = 0
    _phase: str = ""
    _asked: int = 0
    _left: dict[int, None] = field(default_factory=dict)

    def begin(self, number: int, rounds: int) -> None:
        """A round begins."""
        self.round, self.rounds = number, rounds
        self.note("round")

    def note(self, phase: str) -> None:
        """Something goes on for which nobody is asked."""
        self.ask(phase, ())

    def ask(self, phase: str, nodes: Iterable[int]) -> None:
        """These nodes are asked now."""
        self._phase, self._left = phase, dict.fromkeys(nodes)
        self._asked = len(self._left)
        self._say()

    def fill(self, size: int, held: int, nodes: Iterable[int]) -> None:
        """A buffer holds so many of ``size`` updates, and these nodes train."""
        self._phase, self._asked = "train", size
        self._left = dict.fromkeys(nodes)
        self._say(answered=held)

    def heard(self, node: int) -> None:
        """A node has answered, whatever it said."""
        if node not in self._left:
            return
        del self._left[node]
        left = len(self._left)
        if left <= _MOST_NAMES or left % max(1, self._asked // _PARTS) == 0:
            self._say()

    def _say(self, answered: int | None = None) -> None:
        if self.tell is None:
            return
        left = list(self._left)
        shown = left[:_MOST_NAMES] if self.names else []
        self.tell(
            Stand(
                self._phase,
                self.round,
                self.rounds,
                asked=self._asked,
                answered=self._asked - len(left) if answered is None else answered,
                waiting=tuple(map(self.name, shown)),
            )
        )

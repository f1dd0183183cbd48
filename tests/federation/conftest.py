"""A real federation on this machine, stopped at the end of each test."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from simulations.bench.federation import Federation


@pytest.fixture
def federation(tmp_path) -> Iterator[Callable[..., Federation]]:
    made: list[Federation] = []

    def make(**words: object) -> Federation:
        folder = tmp_path / f"federation{len(made)}"
        folder.mkdir()
        made.append(Federation(folder, **words))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for one in made:
        one.kill_9_everything()

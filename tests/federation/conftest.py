"""A real federation on this machine, stopped at the end of each test."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from dare_agg.secure.identity import new_identity, write_identity, write_public
from dare_agg.secure.roster import Roster, make_roster, sign_roster, write_roster
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


@pytest.fixture
def consortium(tmp_path: Path) -> Callable[[Sequence[str]], tuple[Roster, Callable]]:
    """Keys of a coordinator and of parties, the roster it signed, and each party's node config."""
    passphrase = "of the whole test"

    def make(names: Sequence[str]) -> tuple[Roster, Callable[[str], dict[str, str]]]:
        coordinator = new_identity("coordinator")
        write_public(tmp_path / "coordinator.pub", "coordinator", coordinator.public)
        members = []
        for name in names:
            identity = new_identity(name)
            write_identity(tmp_path / f"{name}.key", identity, passphrase)
            members.append((name, identity.public))
        roster = sign_roster(make_roster("of the test", members), coordinator)
        write_roster(tmp_path / "roster.json", roster)
        (tmp_path / "passphrase").write_text(passphrase)
        (tmp_path / "passphrase").chmod(0o600)
        return roster, node_config

    def node_config(name: str) -> dict[str, str]:
        return {
            "secure-identity": str(tmp_path / f"{name}.key"),
            "secure-roster": str(tmp_path / "roster.json"),
            "secure-trust": str(tmp_path / "coordinator.pub"),
            "secure-passphrase-file": str(tmp_path / "passphrase"),
            "secure-state": str(tmp_path / "state"),
        }

    return make

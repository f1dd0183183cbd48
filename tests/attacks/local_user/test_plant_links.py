"""They plant links at the names that drafts used to have, to have our files overwritten."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from dare_agg.errors import StateError
from dare_agg.files import atomic
from dare_agg.files.atomic import replace_file
from dare_agg.secure import make_roster, new_identity, write_roster
from server.recorder import write_json


def writers(folder: Path) -> dict[str, Callable[[], None]]:
    roster = make_roster("r", [("a", new_identity("a").public)])
    return {
        "run.state": lambda: replace_file(folder / "run.state", (b"new",)),
        "roster.json": lambda: write_roster(folder / "roster.json", roster),
        "run.json": lambda: write_json(folder / "run.json", {"status": "running"}),
    }


@pytest.mark.parametrize("name", ["run.state", "roster.json", "run.json"])
def test_links_at_the_old_names_of_drafts(place: Path, tmp_path: Path, name: str) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    process = os.getpid()
    for old in (f".{name}.{process}.part", f"{name}.part", f".{name}.partial-{process}"):
        (place / old).symlink_to(victim)
    writers(place)[name]()
    assert victim.read_text() == "precious" and not (place / name).is_symlink()


@pytest.mark.parametrize("name", ["run.state", "roster.json", "run.json"])
def test_even_a_name_that_was_guessed(place, tmp_path, monkeypatch, name) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    monkeypatch.setattr(atomic.secrets, "token_hex", lambda size: "guessed")
    (place / f".{name}.guessed.part").symlink_to(victim)
    with pytest.raises(StateError, match="was not written: File exists"):
        writers(place)[name]()
    assert victim.read_text() == "precious" and not (place / name).exists()

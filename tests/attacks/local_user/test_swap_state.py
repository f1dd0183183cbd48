"""They make or swap the folders in which a party keeps its session secrets and its keys."""

import os
import re
from pathlib import Path

import pytest

from dare_agg.errors import ConfigError, StateError
from dare_agg.files.trust import own_folder
from dare_agg.secure import new_identity, read_identity, write_identity
from dare_agg.secure.identity import read_trusted, write_public
from dare_agg.secure.vault import Vault, default_folder

SESSION = b"\1" * 32
PASSPHRASE = "a passphrase"


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


def test_a_state_folder_they_made_before_us(place, nobody, monkeypatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(place))
    folder = default_folder()
    folder.mkdir(mode=0o700)
    os.chown(folder, nobody, nobody)
    vault = Vault(folder, new_identity("north"))
    for act in (
        lambda: vault.put(SESSION, "state", b"secret"),
        lambda: vault.get(SESSION, "state"),
        lambda: vault.alone().__enter__(),
    ):
        with pytest.raises(StateError, match=r"belongs to user nobody \(65534\), who could swap"):
            act()
    assert os.listdir(folder) == []
    # The remedy that the error names.
    own = Vault(place / "own", vault.identity)
    own.put(SESSION, "state", b"secret")
    assert own.get(SESSION, "state") == b"secret" and mode(place / "own") == 0o700


def test_a_state_folder_below_one_that_others_may_write(tmp_path: Path) -> None:
    open_to_all = tmp_path / "data"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    vault = Vault(open_to_all / "deep" / "state", new_identity("north"))
    with pytest.raises(StateError, match=re.escape(f"chmod go-w {open_to_all}")):
        vault.put(SESSION, "state", b"secret")
    assert os.listdir(open_to_all) == []
    open_to_all.chmod(0o755)
    vault.put(SESSION, "state", b"secret")
    open_to_all.chmod(0o777)
    with pytest.raises(StateError, match="has mode 777"):
        vault.get(SESSION, "state")


def test_state_beside_them_in_a_sticky_folder_is_out_of_their_reach(place, as_nobody) -> None:
    vault = Vault(place / "state", new_identity("north"))
    vault.put(SESSION, "state", b"secret")
    assert as_nobody(lambda: (place / "theirs").mkdir())
    assert not as_nobody(lambda: (place / "state").rename(place / "gone"))
    assert not as_nobody(lambda: os.listdir(place / "state"))
    assert vault.get(SESSION, "state") == b"secret"


def test_a_link_of_theirs_leads_nowhere_and_one_of_ours_does(place, tmp_path, nobody) -> None:
    identity = new_identity("north")
    (tmp_path / "ours").mkdir()
    link = place / "state"
    link.symlink_to(tmp_path / "ours")
    Vault(link, identity).put(SESSION, "state", b"secret")
    assert Vault(tmp_path / "ours", identity).get(SESSION, "state") == b"secret"
    os.chown(link, nobody, nobody, follow_symlinks=False)
    with pytest.raises(StateError, match="belongs to user nobody"):
        Vault(link, identity).put(SESSION, "state", b"secret")


def test_a_circle_of_links_and_a_file_for_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="more than 40 links"):
        Vault(tmp_path / "a" / "c", new_identity("n")).put(SESSION, "state", b"secret")
    with pytest.raises(StateError):
        Vault(tmp_path / "file", new_identity("n")).put(SESSION, "state", b"secret")


def test_default_folders_are_ours_alone_whatever_the_umask(place, monkeypatch) -> None:
    before = os.umask(0)
    try:
        monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
        monkeypatch.setenv("DARE_AGG_CACHE", str(place / "cache"))
        Vault(default_folder(), new_identity("n")).put(SESSION, "state", b"secret")
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(place))
        Vault(default_folder(), new_identity("n")).put(SESSION, "state", b"secret")
    finally:
        os.umask(before)
    made = [path for path in place.rglob("*") if path.is_dir()]
    assert len(made) == 5 and {mode(path) for path in made} == {0o700}
    assert {mode(path) for path in place.rglob("*.state")} == {0o600}


def test_a_group_with_others_in_it_may_not_write_above(tmp_path: Path, nobody: int) -> None:
    folder = tmp_path / "team"
    folder.mkdir()
    folder.chmod(0o775)
    own_folder(folder, remedy="move")  # root's own group has no other member
    os.chown(folder, 0, nobody)
    with pytest.raises(StateError, match="has mode 775"):
        own_folder(folder, remedy="move")


def test_a_key_that_they_could_swap(place, tmp_path, nobody) -> None:
    key, public = tmp_path / "north.key", tmp_path / "coordinator.pub"
    write_identity(key, new_identity("north"), PASSPHRASE)
    write_public(public, "coordinator", new_identity("coordinator").public)
    assert read_identity(key, PASSPHRASE).name == "north" and len(read_trusted(public)) == 32
    for path, read in ((key, lambda p: read_identity(p, PASSPHRASE)), (public, read_trusted)):
        os.chown(path, nobody, nobody)
        with pytest.raises(StateError, match="belongs to user nobody"):
            read(path)
        os.chown(path, 0, 0)
        tmp_path.chmod(0o777)
        with pytest.raises(StateError, match=f"other users could swap {path}; chmod go-w"):
            read(path)
        tmp_path.chmod(0o700)
        # A link that they planted beside us: its target is ours, the next one need not be.
        link = place / path.name
        link.symlink_to(path)
        os.chown(link, nobody, nobody, follow_symlinks=False)
        with pytest.raises(StateError, match="belongs to user nobody"):
            read(link)
    public.chmod(0o666)
    with pytest.raises(StateError, match="has mode 666"):
        read_trusted(public)
    key.chmod(0o644)
    with pytest.raises(ConfigError, match="others may read it: chmod 600"):
        read_identity(key, PASSPHRASE)


def test_a_pipe_in_place_of_a_key_does_not_hold_us(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "north.key", 0o600)
    with pytest.raises(StateError, match="no regular file"):
        read_identity(tmp_path / "north.key", PASSPHRASE)


def test_the_folder_of_the_warm_trainers_socket(place: Path, nobody: int, monkeypatch) -> None:
    from dare_agg.errors import RunError
    from dare_agg.flower.warm import private_folder

    monkeypatch.setenv("XDG_RUNTIME_DIR", str(place))
    assert mode(private_folder()) == 0o700
    os.chown(place, nobody, nobody)
    with pytest.raises(RunError, match="belongs to user nobody"):
        private_folder()

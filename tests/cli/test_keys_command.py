"""`dare-agg keys`: identities encrypted at rest, rosters signed and checked."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dare_agg.cli.main import main
from dare_agg.codec.mask import parse_drop_rate
from dare_agg.errors import ConfigError, ProtocolError, StateError
from dare_agg.secure.identity import key_fingerprint, read_identity, read_public
from dare_agg.secure.ledger import FileLedger
from dare_agg.secure.roster import check_roster, read_roster
from dare_agg.secure.terms import secure_terms

PASSPHRASE = "correct horse"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DARE_AGG_PASSPHRASE", PASSPHRASE)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["keys", *words, "--json"])
    assert ended.value.code == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def fails(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["keys", *words])
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_from_keys_to_a_checked_roster(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    made = [run(capsys, "make", name) for name in ("north", "south", "east")]
    run(capsys, "make", "the coordinator", "-o", "coordinator.key")
    for each in made:
        private = Path(each["private"])
        assert private.stat().st_mode & 0o777 == 0o600
        identity = read_identity(private, PASSPHRASE)
        assert identity.secret.hex() not in private.read_text()
        assert key_fingerprint(identity.public) == each["fingerprint"]
        assert read_public(Path(each["public"]))["public"] == each["public_key"]
    listed = run(capsys, "roster", "trio", *(each["public"] for each in made))
    assert {m["fingerprint"] for m in listed["members"]} == {e["fingerprint"] for e in made}
    assert listed["signatures"] == []
    run(capsys, "sign", "roster.json", "-i", "coordinator.key", "--yes")
    shown = run(capsys, "show", "roster.json", "north.pub", "--trust", "coordinator.pub")
    assert shown["files"][0]["signatures"][0]["trusted"] is True
    assert shown["files"][1]["fingerprint"] == made[0]["fingerprint"]
    public = bytes.fromhex(read_public(here / "coordinator.pub")["public"])
    check_roster(read_roster(here / "roster.json"), [public])
    assert "lacks the signature" in fails(capsys, "show", "roster.json", "--trust", "north.pub")


def test_a_changed_roster_is_told(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    for name in ("a", "b", "c", "d"):
        run(capsys, "make", name)
    run(capsys, "roster", "trio", "a.pub", "b.pub", "c.pub")
    run(capsys, "sign", "roster.json", "-i", "a.key", "--yes")
    record = json.loads((here / "roster.json").read_text())
    record["members"][0]["public"] = read_public(here / "d.pub")["public"]
    (here / "roster.json").write_text(json.dumps(record))
    assert "signature" in fails(capsys, "show", "roster.json")


def test_nothing_is_overwritten(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    run(capsys, "make", "north")
    before = (here / "north.key").read_bytes()
    assert "never overwritten" in fails(capsys, "make", "north")
    (here / "north.pub").unlink()
    assert "never overwritten" in fails(capsys, "make", "north")
    assert (here / "north.key").read_bytes() == before
    (here / "roster.json").write_text("mine")
    (here / "north.pub").write_text("{}")
    assert "never overwritten" in fails(capsys, "roster", "x", "north.pub")
    assert "both keys" in fails(capsys, "make", "other", "-o", "other.pub")


def test_signing_is_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, here: Path
) -> None:
    run(capsys, "make", "a")
    run(capsys, "roster", "one", "a.pub")
    answers = iter([False, True])
    monkeypatch.setattr("typer.confirm", lambda *_, **__: next(answers))
    assert "was not signed" in " ".join(
        fails_after(capsys, "sign", "roster.json", "-i", "a.key").split()
    )
    assert read_roster(here / "roster.json").signatures == ()
    run(capsys, "sign", "roster.json", "-i", "a.key")
    assert len(read_roster(here / "roster.json").signatures) == 1


def fails_after(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["keys", *words])
    assert ended.value.code == 1
    return capsys.readouterr().err


def test_passphrases(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, here: Path
) -> None:
    file = here / "pass"
    file.write_text("another one\nsecond line\n")
    file.chmod(0o644)
    assert "chmod 600" in fails(capsys, "make", "a", "--passphrase-file", "pass")
    file.chmod(0o600)
    run(capsys, "make", "a", "--passphrase-file", "pass")
    assert read_identity(here / "a.key", "another one").name == "a"
    with pytest.raises(StateError, match="passphrase is wrong"):
        read_identity(here / "a.key", PASSPHRASE)
    with pytest.raises(StateError, match="public key alone"):
        read_identity(here / "a.pub", PASSPHRASE)
    (here / "a.key").chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_identity(here / "a.key", "another one")
    monkeypatch.setenv("DARE_AGG_PASSPHRASE", "short")
    assert "at least 8" in fails(capsys, "make", "b")
    assert not (here / "b.key").exists()
    monkeypatch.delenv("DARE_AGG_PASSPHRASE")
    assert "DARE_AGG_PASSPHRASE" in fails(capsys, "make", "b")
    (here / "empty").touch(0o600)
    assert "is empty" in fails(capsys, "make", "b", "--passphrase-file", "empty")


def test_a_ledger_is_shown_and_one_entry_forgotten(
    capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    sessions = []
    for number in range(3):
        terms = secure_terms(
            run="merge", round_number=number, roster=bytes(32), cohort=[1, 2, 3], base="0" * 64,
            layout="0" * 64, size=4, drop_rate=parse_drop_rate("0"),
        )  # fmt: skip
        FileLedger(here / "north.ledger").claim(terms, np.full(4, number, np.float32))
        sessions.append(terms.session.hex())
    shown = run(capsys, "ledger", "north.ledger")["contributions"]
    assert [(c["session"], c["number"], c["run"]) for c in shown] == [
        (session, number, "merge") for number, session in enumerate(sessions)
    ]
    assert "0 sessions" in fails(capsys, "ledger", "north.ledger", "--forget", "x")
    assert "No such file" in fails(capsys, "ledger", "south.ledger")
    left = run(capsys, "ledger", "north.ledger", "--forget", sessions[1][:12], "--yes")
    assert [c["number"] for c in left["contributions"]] == [0, 2]
    another = replace(terms, run="another")
    FileLedger(here / "north.ledger").claim(another, np.full(4, 1, np.float32))
    with pytest.raises(ProtocolError):
        FileLedger(here / "north.ledger").claim(another, np.full(4, 2, np.float32))

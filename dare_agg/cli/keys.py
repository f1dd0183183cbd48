"""`dare-agg keys`: identities and rosters for secure sums."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from dare_agg.secure.ledger import Entry
    from dare_agg.secure.roster import Roster

keys = typer.Typer(
    help="Make identities and sign rosters for secure merging.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
PassphraseFile = Annotated[
    Path | None,
    typer.Option(
        help="File with the passphrase on its first line [else DARE_AGG_PASSPHRASE, else asked]."
    ),
]


@keys.command()
def make(
    name: Annotated[str, typer.Argument(help="The party's name, as others shall see it.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Private key file [default: NAME.key].")
    ] = None,
    passphrase_file: PassphraseFile = None,
    json_: Json = False,
) -> None:
    """Make an identity: a private key, encrypted, and a public one beside it."""
    from dare_agg.cli.output import print_json
    from dare_agg.errors import StateError
    from dare_agg.secure.identity import key_fingerprint, new_identity, write_identity, write_public

    identity = new_identity(name)
    private = output or Path(f"{_file_name(name)}.key")
    public = private.with_suffix(".pub")
    if public == private:
        raise StateError(f"{private} would be both keys; give the private one another suffix")
    if public.exists():
        raise StateError(f"{public} exists; keys are never overwritten: choose another name")
    write_identity(private, identity, _passphrase(passphrase_file, confirm=True))
    write_public(public, name, identity.public)
    fingerprint = key_fingerprint(identity.public)
    if json_:
        print_json(
            {
                "name": name,
                "private": str(private),
                "public": str(public),
                "public_key": identity.public.hex(),
                "fingerprint": fingerprint,
            }
        )
        return
    typer.echo(f"{private}: private key, encrypted; keep it here")
    typer.echo(f"{public}: public key; give it to the consortium")
    typer.echo(f"Fingerprint: {fingerprint}")
    typer.echo("Next: read the fingerprint to the others over the telephone")


@keys.command()
def roster(
    name: Annotated[str, typer.Argument(help="Name of the consortium.")],
    members: Annotated[list[Path], typer.Argument(help="The members' .pub files.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Roster file.")] = Path(
        "roster.json"
    ),
    serial: Annotated[int, typer.Option(help="Grows with each new roster of this name.")] = 1,
    json_: Json = False,
) -> None:
    """List the members in a roster, to be signed."""
    from dare_agg.errors import StateError
    from dare_agg.secure.identity import read_public
    from dare_agg.secure.roster import make_roster, write_roster

    if output.exists():
        raise StateError(f"{output} exists; rosters are never overwritten: choose another name")
    records = [read_public(path) for path in members]
    made = make_roster(name, [(r["name"], bytes.fromhex(r["public"])) for r in records], serial)
    write_roster(output, made)
    _print_roster(output, made, [], json_)
    if not json_:
        typer.echo(f"Next: dare-agg keys sign {output} --identity YOUR.key")


@keys.command()
def sign(
    roster_file: Annotated[Path, typer.Argument(metavar="ROSTER", help="Roster file.")],
    identity: Annotated[Path, typer.Option("--identity", "-i", help="Private key of who signs.")],
    passphrase_file: PassphraseFile = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    json_: Json = False,
) -> None:
    """Sign a roster, once its fingerprints have been compared."""
    from dare_agg.errors import ConfigError
    from dare_agg.secure.identity import read_identity
    from dare_agg.secure.roster import read_roster, sign_roster, write_roster

    found = read_roster(roster_file)
    if not yes:
        _print_roster(roster_file, found, [], False, error=True)
        if not typer.confirm("Are these the members, by fingerprint?", err=True):
            raise ConfigError(f"{roster_file} was not signed")
    signer = read_identity(identity, _passphrase(passphrase_file))
    signed = sign_roster(found, signer)
    write_roster(roster_file, signed)
    _print_roster(roster_file, signed, [], json_)


@keys.command()
def show(
    files: Annotated[list[Path], typer.Argument(help="Keys (.pub, .key) and rosters.")],
    trust: Annotated[
        list[Path] | None,
        typer.Option(help="Public key whose signature a roster must carry; repeat."),
    ] = None,
    json_: Json = False,
) -> None:
    """Show fingerprints, and who signed a roster; fails on a signature that does not hold."""
    from dare_agg.cli.output import print_json
    from dare_agg.secure.identity import key_fingerprint, read_public
    from dare_agg.secure.roster import check_roster, read_roster

    trusted = [bytes.fromhex(read_public(path)["public"]) for path in trust or []]
    found: list[dict[str, Any]] = []
    for path in files:
        if _is_roster(path):
            listed = read_roster(path)
            signers = [*dict(listed.signatures), *trusted]
            if signers:
                check_roster(listed, signers)
            found.append(_roster_facts(path, listed, trusted))
            if not json_:
                _print_roster(path, listed, trusted, False)
            continue
        record = read_public(path)
        fingerprint = key_fingerprint(bytes.fromhex(record["public"]))
        found.append({"file": str(path), "name": record["name"], "fingerprint": fingerprint})
        if not json_:
            typer.echo(f"{path}: {record['name']}  {fingerprint}")
    if json_:
        print_json({"files": found})


@keys.command()
def ledger(
    path: Annotated[Path, typer.Argument(metavar="LEDGER", help="Ledger, such as north.ledger.")],
    forget: Annotated[
        str, typer.Option(help="Session (first digits): its data may enter another sum.")
    ] = "",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    json_: Json = False,
) -> None:
    """Show what this party has put into secure sums; let it forget one that came to nothing."""
    from dare_agg.cli.output import print_json
    from dare_agg.errors import ConfigError
    from dare_agg.secure.ledger import FileLedger

    book = FileLedger(path)
    if forget:
        entry = _one_session(book.entries(), forget, path)
        if not yes:
            typer.echo(
                f"If anyone has unmasked session {entry.session[:12]}, a second sum with the same "
                "data shows single parties' data by subtraction.",
                err=True,
            )
            if not typer.confirm("Is it sure that this session gave no result?", err=True):
                raise ConfigError(f"{path} was left as it is")
        book.forget(entry.session)
    found = book.entries()
    if json_:
        shown = ("session", "run", "number", "time")
        rows = [{name: getattr(entry, name) for name in shown} for entry in found]
        print_json({"file": str(path), "contributions": rows})
        return
    for entry in found:
        typer.echo(f"{entry.time}  session {entry.session[:12]}  run {entry.run}  #{entry.number}")
    typer.echo(f"{path}: {len(found)} contributions")


def _one_session(entries: Sequence[Entry], begin: str, path: Path) -> Entry:
    from dare_agg.errors import ConfigError

    fits = [entry for entry in entries if entry.session.startswith(begin)]
    if len(fits) != 1:
        raise ConfigError(
            f"{len(fits)} sessions of {path} begin with {begin!r}; give the digits of one, see "
            f"dare-agg keys ledger {path}"
        )
    return fits[0]


def _is_roster(path: Path) -> bool:
    from dare_agg.files.json_text import read_json

    try:
        record = read_json(path)
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and str(record.get("format", "")).startswith("dare-agg roster")


def _roster_facts(path: Path, roster: Roster, trusted: Sequence[bytes]) -> dict[str, Any]:
    from dare_agg.secure.identity import key_fingerprint

    names = {member.public: member.name for member in roster.members}
    return {
        "file": str(path),
        "name": roster.name,
        "serial": roster.serial,
        "digest": roster.digest.hex(),
        "members": [
            {"id": m.id, "name": m.name, "fingerprint": key_fingerprint(m.public)}
            for m in roster.members
        ],
        "signatures": [
            {
                "name": names.get(public, ""),
                "fingerprint": key_fingerprint(public),
                "trusted": public in trusted,
            }
            for public, _ in roster.signatures
        ],
    }


def _print_roster(
    path: Path, roster: Roster, trusted: Sequence[bytes], json_: bool, *, error: bool = False
) -> None:
    from dare_agg.cli.output import print_json

    facts = _roster_facts(path, roster, trusted)
    if json_:
        print_json(facts)
        return

    def say(text: str) -> None:
        typer.echo(text, err=error)

    say(f"{path}: roster {roster.name!r}, serial {roster.serial}, digest {facts['digest'][:16]}")
    for member in facts["members"]:
        say(f"  {member['id']:>3}  {member['fingerprint']}  {member['name']}")
    for signature in facts["signatures"]:
        who = signature["name"] or "no member"
        pinned = ", trusted" if signature["trusted"] else ""
        say(f"  signed by {signature['fingerprint']} ({who}{pinned})")
    if not facts["signatures"]:
        say("  not signed")


def _passphrase(file: Path | None, *, confirm: bool = False) -> str:
    """The passphrase of the file or the environment; else the person at the terminal."""
    import sys

    from dare_agg.secure.identity import find_passphrase, need_passphrase

    found = find_passphrase(file)
    if found is not None:
        return found
    if not sys.stdin.isatty():
        return need_passphrase(file)
    return str(typer.prompt("Passphrase", hide_input=True, confirmation_prompt=confirm, err=True))


def _file_name(name: str) -> str:
    return "".join(ch if ch.isalnum() or ch in "-_." else "-" for ch in name)

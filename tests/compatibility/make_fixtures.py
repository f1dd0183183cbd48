"""Makes ``tests/data/made-by-0.1`` with the code of commit 67cbe40, and with no other.

It imports the modules where they were then, so it is no test and runs in a checkout of that
commit alone::

    git worktree add --detach ../old 67cbe40
    cd ../old && PYTHONPATH=. python .../tests/compatibility/make_fixtures.py OUT

The tests beside it read OUT with the present code.
"""

# Ruff sorts by the modules that exist, and these do no more.
# ruff: noqa: I001

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from exact_app import (
    CUT_OFF,
    ROUNDS,
    RUN_CLIENTS,
    RUN_CONFIG,
    SAMPLING,
    SECURE_RUN,
    SECURE_SUM,
    STRATEGIES,
    Unmoved,
    exact,
    exact_app,
    record,
    run_node,
    seeded,
    start_arrays,
    version_round,
)
from flwr.app import Context, Message, RecordDict

from dare_agg import fingerprints
from dare_agg.checkpoint import write_checkpoint
from dare_agg.cli.main import main as dare_agg
from dare_agg.downlink import SharedMask
from dare_agg.flower import DareStrategy, dare_mod
from dare_agg.flower.resume import keep_base, resume, save
from dare_agg.flower.secure_mod import secure_mod, secure_queries
from dare_agg.flower.secure_strategy import SecureStrategy
from dare_agg.groups import global_model
from dare_agg.identity import load_identity, make_identity, public_hex
from dare_agg.mask import parse_drop_rate
from dare_agg.secure import SecureServer, secure_terms
from dare_agg.secure.client import SecurePolicy
from dare_agg.secure.identity import read_identity, read_public
from dare_agg.secure.ledger import FileLedger, tensor_claim
from dare_agg.secure.party import REQUESTS, Contribution, Party
from dare_agg.secure.roster import read_roster
from dare_agg.secure.settings import SecureSettings
from dare_agg.secure.vault import Vault
from dare_agg.state import StateFolder, write_state
from dare_agg.statistics import write_statistics
from dare_agg.version_cache import VersionReceiver
from dare_agg.versions import FORMS, make_version_downlink, write_base
from server.app import main as run_server
from server.config import RunConfig
from simulations.memory_grid import MemoryGrid, pretend_task

PASSPHRASE = "correct horse battery"
VALUES = ("f32", "f16", "bf16", "i8", "b4", "b2", "b1")


def call(*words: object) -> str:
    """Run a `dare-agg` command; returns what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            dare_agg([str(word) for word in words])
        except SystemExit as ended:
            if ended.code:
                raise RuntimeError(f"{words} ended with {ended.code}") from ended
    return printed.getvalue()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_expected(folder: Path, value: Any) -> None:
    text = json.dumps(value, indent=1, sort_keys=True) + "\n"
    (folder / "expected.json").write_text(text, encoding="utf-8")


# --- update files, merges ------------------------------------------------------------------

SHAPES = {
    "body.weight": (24, 16),
    "body.bias": (24,),
    "norm.weight": (16,),
    "head.weight": (3, 16),
    "temperature": (),
}
DTYPES = {
    "body.weight": "F32",
    "body.bias": "F32",
    "norm.weight": "F16",
    "head.weight": "BF16",
    "temperature": "F32",
}


def checkpoints(folder: Path) -> None:
    base = {n: exact("base", n, shape=s, exponent=16) for n, s in SHAPES.items()}
    buffers = {"position_ids": np.arange(8, dtype=np.int64)}
    write_checkpoint(folder / "base.safetensors", {**base, **buffers}, dtypes=DTYPES)
    for name in ("tuned", "other"):
        tuned = {n: a + exact(name, n, shape=a.shape, exponent=23) for n, a in base.items()}
        write_checkpoint(folder / f"{name}.safetensors", {**tuned, **buffers}, dtypes=DTYPES)
        squares = {n: np.abs(exact("fisher", name, n, shape=s)) for n, s in SHAPES.items()}
        about = {"model": name, "data": "letters", "rule": "true"}
        write_statistics(folder / f"{name}-fisher.safetensors", squares, "fisher", about)


def updates(folder: Path) -> None:
    folder.mkdir(parents=True)
    os.chdir(folder)
    checkpoints(folder)
    expected: dict[str, Any] = {}
    for number, (mask, values) in enumerate((m, v) for m in ("stratified", "bernoulli")
                                            for v in VALUES):  # fmt: skip
        words = ["--values", values, "--mask", mask, "--seed", str(number), "--drop-rate"]
        words.append(("0.75", "0.5", "0.3", "0.9")[number % 4])
        if number % 3 == 1:
            words += ["--rank", str(number % 5)]
        if values == "i8":
            words += ["--exclude", "^head"]
        name = f"{values}-{mask}.dare"
        call("diff", "base.safetensors", "tuned.safetensors", "-o", name, *words)
        call("apply", "base.safetensors", name, "-o", "out.safetensors", "--force")
        inspected = json.loads(call("inspect", name, "--json"))
        expected[name] = {
            "words": words,
            "restored": sha256(folder / "out.safetensors"),
            "inspected": inspected,
        }
    (folder / "out.safetensors").unlink()
    write_expected(folder, expected)


MERGES: dict[str, list[str]] = {
    "of-updates": ["f32-stratified.dare", "b1-bernoulli.dare", "other.safetensors",
                   "--method", "ties", "--weights", "1,2,0.5", "--scaling", "0.75"],
    "sparsified": ["tuned.safetensors", "other.safetensors", "--method", "task-arithmetic",
                   "--drop-rate", "0.5", "--seed", "7", "--exclude", "^head",
                   "--scale", "bias=0.5"],
    "fisher": ["tuned.safetensors", "other.safetensors", "--method", "fisher",
               "--statistics", "tuned-fisher.safetensors",
               "--statistics", "other-fisher.safetensors"],
}  # fmt: skip


def merges(updates_folder: Path, folder: Path) -> None:
    folder.mkdir()
    os.chdir(updates_folder)
    expected = {}
    for name, words in MERGES.items():
        call("merge", "base.safetensors", *words, "-o", "merged")
        expected[name] = sha256(Path("merged/model.safetensors"))
        shutil.copy("merged/README.md", folder / f"{name}.md")
        shutil.rmtree("merged")
    write_expected(folder, expected)


# --- states of federated runs --------------------------------------------------------------


def go_on(folder: Path, name: str, stop_after: int | None = None) -> str:
    """Start or go on with a run of `STRATEGIES`; returns the version it ends at."""
    words = dict(STRATEGIES[name])
    form = words.pop("downlink")
    kept = StateFolder(folder)
    strategy = DareStrategy(
        **SAMPLING,
        **words,
        downlink=None if form == "full" else make_version_downlink(form),
        round_hook=lambda o: bool(save(strategy, kept, o)) or o.round == stop_after,
    )
    resumed = resume(strategy, kept)
    if resumed is None:
        keep_base(kept, record(start_arrays()))
    strategy.start(
        MemoryGrid(exact_app([dare_mod]), 3),
        resumed.arrays if resumed else record(start_arrays()),
        num_rounds=ROUNDS,
        start_round=resumed.round + 1 if resumed else 1,
        step_state=resumed.step_state if resumed else None,
    )
    kept.release()
    (folder / "lock").unlink()
    assert strategy.outcome is not None
    return strategy.outcome.model.ref.version


def states(folder: Path, scratch: Path) -> None:
    expected = {}
    for name in STRATEGIES:
        version = go_on(folder / name, name, CUT_OFF)
        if STRATEGIES[name]["seed"] is None:
            # The secret cannot be drawn again: the old code goes on with it.
            shutil.copytree(folder / name, scratch / name)
        whole = go_on(scratch / name, name)
        expected[name] = {"version": version, "undisturbed": whole}
    write_expected(folder, expected)


# --- versions ------------------------------------------------------------------------------


def versions(folder: Path) -> None:
    folder.mkdir()
    (folder / "base.safetensors").write_bytes(write_base(start_arrays()))
    expected: dict[str, Any] = {}
    for form in FORMS:
        downlink = make_version_downlink(form)
        model = downlink.start(global_model(start_arrays(), dense=["^head"]))
        receiver = VersionReceiver(folder / "cache", form, downlink.base_version, dense=("^head",))
        found = []
        for number in range(1, 5):
            step, dense, masks = version_round(form, number, (model.delta.size, model.dense.size))
            plans = [SharedMask(drop_rate=parse_drop_rate("0.75"), **words) for words in masks]
            if number == 4:
                found.append(downlink.advance(model, step, dense, plans).ref.version)
                continue
            model = downlink.advance(model, step, dense, plans)
            found.append(model.ref.version)
            if number == 1:
                sent = downlink.broadcast(model, receiver.have())
                receiver.receive(model.ref.version, sent.payloads, None)
            if number == 3:
                arrays = downlink.state_arrays()
                write_state(folder / f"{form}.state", {k: a.copy() for k, a in arrays.items()}, {})
        expected[form] = {"versions": found, "base": downlink.base_version}
    write_expected(folder, expected)


# --- secure sums, signatures ---------------------------------------------------------------

NAMES = ("north", "south", "east", "west")


def keys(folder: Path) -> None:
    """The folder that a simulation's parties are pointed at, made by `dare-agg keys`."""
    folder.mkdir()
    os.chdir(folder)
    for number, name in enumerate(NAMES):
        call("keys", "make", name, "-o", f"party-{number}.key")
    call("keys", "make", "coordinator", "-o", "coordinator.key")
    parties = [f"party-{number}.pub" for number in range(4)]
    call("keys", "roster", "four winds", *parties, "--serial", "3")
    for signer in ("coordinator", "party-2"):
        call("keys", "sign", "roster.json", "-i", f"{signer}.key", "--yes")


def secure_state(keys_folder: Path, folder: Path) -> dict[str, Any]:
    """Two rounds of a secure run; its parties' ledgers come to lie beside their keys."""
    os.environ["DARE_AGG_SECURE_KEYS"] = str(keys_folder)
    app = exact_app([secure_mod, dare_mod])
    secure_queries(app)
    kept = StateFolder(folder)
    strategy = SecureStrategy(
        **SECURE_RUN,
        secure=SecureSettings(**SECURE_SUM),
        roster=read_roster(keys_folder / "roster.json"),
        downlink=make_version_downlink("auto"),
        round_hook=lambda o: save(strategy, kept, o),
    )
    resume(strategy, kept)
    keep_base(kept, record(start_arrays()))
    strategy.start(MemoryGrid(app, 4), record(start_arrays()), num_rounds=2)
    kept.release()
    (folder / "lock").unlink()
    assert strategy.outcome is not None
    assert strategy.outcome.measurements["accepted"] == 4
    return {
        "version": strategy.outcome.model.ref.version,
        "ledgers": [shown(keys_folder / f"party-{number}.ledger") for number in range(4)],
    }


def session(keys_folder: Path, folder: Path) -> dict[str, Any]:
    """One session of TIES: party 1 before each step, what it is asked and what it answers."""
    roster = read_roster(keys_folder / "roster.json")
    found = [read_identity(keys_folder / f"party-{n}.key", PASSPHRASE) for n in range(4)]
    identities = {roster.id_of(one.public): one for one in found}
    terms = secure_terms(
        run="merge", round_number=9, roster=roster.digest, cohort=range(1, 5), base="ab" * 32,
        layout="cd" * 32, size=300, dense=7, drop_rate=parse_drop_rate("0.5"), aggregate="ties",
        bits=16, clip=1.0,
    )  # fmt: skip
    scratch = folder / "scratch"

    def party(number: int, stage: str) -> Party:
        one = identities[number]
        ledger = FileLedger(scratch / f"party-{number}.ledger")
        vault = Vault(scratch / f"vault-{number}", one)
        return Party(one, roster, vault, ledger, seeded(f"{stage} {number}"))

    server = SecureServer(terms, roster)
    for number in terms.cohort:
        given = Contribution(
            exact("delta", number, shape=(300,), exponent=16),
            exact("dense", number, shape=(7,), exponent=16),
        )
        policy = SecurePolicy(terms.base, terms.layout)
        server.take(party(number, "advertise").advertise(terms.encode(), policy, given))
    for stage in REQUESTS:
        for number, request in server.close().items():
            if number == 1:
                place = folder / stage
                place.mkdir(parents=True)
                shutil.copytree(scratch / "vault-1", place / "vault")
                (place / "request.bin").write_bytes(request)
            answer = party(number, stage).answer(stage, terms.session, request)
            if number == 1:
                (place / "answer.bin").write_bytes(answer)
            server.take(answer)
    server.finish()
    for lock in folder.glob("*/vault/*/lock"):
        lock.unlink()
    shutil.rmtree(scratch)
    return {"session": terms.session.hex(), "party": identities[1].name}


def ledger(path: Path) -> list[dict[str, Any]]:
    """A party's book of three contributions, one of them let go."""
    for number in range(3):
        terms = secure_terms(
            run="merge", round_number=number, roster=bytes(32), cohort=[1, 2, 3], base="0" * 64,
            layout="0" * 64, size=4, drop_rate=parse_drop_rate("0"),
        )  # fmt: skip
        tensors = [tensor_claim(exact("tensor", number, shape=(5,)))]
        FileLedger(path).claim(terms, exact("delta", number, shape=(4,)), tensors)
    given = FileLedger(path).entries()
    FileLedger(path).forget(given[1].session)
    return shown(path)


def shown(path: Path) -> list[dict[str, Any]]:
    return list(json.loads(call("keys", "ledger", path, "--json"))["contributions"])


def secure(folder: Path, scratch: Path) -> None:
    folder.mkdir()
    os.environ["DARE_AGG_PASSPHRASE"] = PASSPHRASE
    os.environ["XDG_RUNTIME_DIR"] = str(scratch)
    keys(folder / "keys")
    expected = {
        "run": secure_state(folder / "keys", folder / "state"),
        "session": session(folder / "keys", folder / "session"),
        "ledger": ledger(folder / "merge.ledger"),
        "roster": json.loads(call("keys", "show", folder / "keys/roster.json", "--json"))["files"][
            0
        ]["digest"],
        "members": [
            [name, read_public(folder / f"keys/party-{n}.pub")["public"]]
            for n, name in enumerate(NAMES)
        ],
        "signature": read_identity(folder / "keys/party-0.key", PASSPHRASE).sign(b"words").hex(),
    }
    write_expected(folder, expected)


def signatures(folder: Path) -> None:
    """A client's signing key and the server's table of the clients it knows."""
    folder.mkdir()
    public = {name: make_identity(folder / f"{name}.pem") for name in ("north", "south")}
    (folder / "identities.json").write_text(json.dumps(public, indent=1) + "\n")
    key = load_identity(folder / "north.pem")
    assert public_hex(key) == public["north"]
    write_expected(folder, {"public": public, "signature": key.sign(bytes(32)).hex()})


# --- the cache -----------------------------------------------------------------------------


def remembered(folder: Path) -> None:
    """A cache folder with the fingerprint of one file."""
    os.environ["DARE_AGG_CACHE"] = str(folder)
    fingerprints.remember([Unmoved()], "cd" * 32, "ef" * 32)  # type: ignore[list-item]


# --- a run folder --------------------------------------------------------------------------


def serve(stop: bool) -> None:
    """The server app in this folder; with ``stop`` the process dies in a third round."""

    def before(msg: Message) -> None:
        order = msg.content["config"]
        if stop and order["method"] == "dare-ties" and order["server-round"] == 3:
            os._exit(9)

    raw = RunConfig().model_dump(by_alias=True) | RUN_CONFIG
    raw = {key: ",".join(v) if isinstance(v, tuple) else v for key, v in raw.items()}
    app = exact_app([dare_mod], before)
    grid = MemoryGrid(app, RUN_CLIENTS, node_config=run_node, run_config=raw)
    run_server(grid, Context(1, 1, {}, RecordDict(), raw))


def start_files(folder: Path) -> None:
    (folder / "base").mkdir(parents=True)
    (folder / "base" / "config.json").write_text('{"model_type": "letters"}\n')
    encoder = {
        name.removeprefix("encoder."): array
        for name, array in start_arrays().items()
        if not name.startswith("head")
    }
    write_checkpoint(folder / "base" / "model.safetensors", encoder)
    (folder / "start.safetensors").write_bytes(write_base(start_arrays()))


def runs(folder: Path, scratch: Path) -> None:
    for place in (folder, scratch / "undisturbed"):
        start_files(place)
    os.chdir(folder)
    child = os.fork()
    if child == 0:
        serve(stop=True)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    report = json.loads(call("report", "run", "--json"))["runs"]
    (folder / "run" / "report.html").unlink()
    shutil.rmtree(folder / "run" / "tensorboard", ignore_errors=True)
    for lock in folder.glob("run/state/*/lock"):
        lock.unlink()
    os.chdir(scratch / "undisturbed")
    serve(stop=False)
    whole = json.loads(Path("run/run.json").read_text())
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    for row in rows:
        del row["seconds"], row["round_seconds"]
    write_expected(folder, {"report": report, "fingerprints": whole["fingerprints"], "rows": rows})


README = """# Files made by the first layout

Everything here was written by the code of commit 67cbe40, before its modules moved: run in a
checkout of that commit, `tests/compatibility/make_fixtures.py` made it. The tests beside that
script read it with the present code, so what users have stored stays readable. Never make it
anew with later code, and never edit it.

| | |
|---|---|
| `updates/` | base, tuned models, statistics; an update file a value format and mask kind |
| `merges/` | model cards of merges of them, whose recipes are merged again |
| `states/` | round states of federated runs that were cut off after round 3 of 5 |
| `versions/` | base file, the server's steps of every form, a client's cache |
| `secure/` | keys, signed roster, ledgers, a sealed session before each step, a secure run |
| `signatures/` | keys that sign updates and the server's table of them |
| `runs/` | folder of a run of two methods, killed in the second one's round 3 of 4 |
| `cache/` | a fingerprint, remembered |

Each `expected.json` holds what that code made of it. The keys protect nothing.
"""


def main(out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / "README.md").write_text(README, encoding="utf-8")
    pretend_task()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        os.environ["DARE_AGG_CACHE"] = str(scratch / "cache")
        updates(out / "updates")
        merges(out / "updates", out / "merges")
        states(out / "states", scratch)
        versions(out / "versions")
        signatures(out / "signatures")
        secure(out / "secure", scratch)
        runs(out / "runs", scratch)
        remembered(out / "cache")
        os.chdir(out)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())

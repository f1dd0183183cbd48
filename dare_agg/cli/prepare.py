"""A run of the app before it starts: its words settled and checked, no folder touched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from dare_agg.cli.app_check import ask_app, check_kinds, check_words
from dare_agg.cli.gpus import check_gpus
from dare_agg.cli.run_config import absolute_paths, as_texts
from dare_agg.errors import ConfigError
from dare_agg.files.app_config import Scalar, absent_words, app_defaults, find_app
from dare_agg.runs.claim import check_folder, read_simulation
from dare_agg.secure.practice import check_consortium

CLIENTS = 10


@dataclass(frozen=True)
class Prepared:
    """A run whose words are settled and checked: nothing is started, no folder touched."""

    app: Path
    settings: dict[str, Scalar]
    usual: Mapping[str, Scalar]
    connection: Mapping[str, Scalar]
    simulated: int


def prepare(
    folder: Path,
    overrides: Mapping[str, Scalar],
    *,
    app: Path | None = None,
    clients: int | None = None,
    cpus: int = 1,
    gpus: float = 0.0,
    federation: str = "",
    root_certificates: Path | None = None,
) -> Prepared:
    """Settle and check all words of a run into ``folder``; raises `DareError` for what is wrong.

    See `run` for the words.
    """
    _need("flwr")
    if not federation:
        _need("ray")
    source = find_app(app)
    usual = app_defaults(source)
    overrides = as_texts(overrides, usual)
    check_words(overrides, usual, absent_words(source))
    resume = overrides.get("resume") is True
    if not resume:
        check_folder(folder)
    own: dict[str, Scalar] = {"output": str(folder)}
    settings = dict(overrides)
    connection: dict[str, Scalar] = {}
    simulated = 0
    if federation:
        connection = _connection(federation, root_certificates)
        if gpus:
            raise ConfigError(
                f"--gpus {gpus:g} beside --federation: it is of simulated clients; a SuperNode "
                "sees its machine's GPUs, and takes device in its --node-config"
            )
    else:
        check_gpus(gpus, str({**usual, **settings}.get("device", "auto")))
        simulated = _simulated_clients(folder, clients, resume)
        absolute_paths(settings)
        own["min-clients"] = simulated
        if settings.get("secure"):
            check_consortium(simulated, parties_models(settings))
            settings["secure-roster"] = str(folder / "keys" / "roster.json")
    # Another app may have no such words.
    settings = {key: value for key, value in own.items() if key in usual} | settings
    if not ask_app(source, settings, here=not federation):
        check_kinds(settings, usual)
    refuse_quantised_models(settings)
    return Prepared(source, settings, usual, connection, simulated)


def _need(package: str) -> None:
    """Raise `ModuleNotFoundError` for what is not installed, without the time of importing it."""
    if find_spec(package) is None:
        raise ModuleNotFoundError(f"no module named {package}", name=package)


def _connection(federation: str, root_certificates: Path | None) -> dict[str, Scalar]:
    """How to reach a SuperLink; raises `ConfigError` for plain text beyond the loopback."""
    if root_certificates is not None:
        if not root_certificates.is_file():
            raise ConfigError(f"--root-certificates: {root_certificates} does not exist")
        return {"address": federation, "root-certificates": str(root_certificates.absolute())}
    if federation.split(":")[0] in ("127.0.0.1", "localhost"):
        return {"address": federation, "insecure": True}
    raise ConfigError(
        f"federation {federation!r} without --root-certificates; plain text is for loopback only: "
        "make certificates with dare-agg certs"
    )


def refuse_quantised_models(settings: Mapping[str, Scalar]) -> None:
    """Raise `QuantisedError` before anything starts where a folder or file named is quantised."""
    from dare_agg.checkpoint import refuse_quantised
    from dare_agg.checkpoint.hub import in_cache

    for key in ("model", "initial", "base"):
        word = str(settings.get(key, ""))
        path = in_cache(word) or Path(word)
        if word and (path.is_dir() or path.suffix == ".safetensors"):
            refuse_quantised(path)


def parties_models(settings: Mapping[str, Scalar]) -> list[str]:
    """The parties' own models of a secure merge, by partition."""
    words = str(settings.get("secure-models", "")).split(",")
    return [word.strip() for word in words if word.strip()]


def _simulated_clients(folder: Path, clients: int | None, resume: bool) -> int:
    """How many clients a simulation has; a resumed run those it had.

    The data are divided among them: raises `ConfigError` where a resumed run had others.
    """
    had = read_simulation(folder) if resume else None
    if had and clients not in (None, had):
        raise ConfigError(
            f"--clients {clients}: the run in {folder} has {had}, among whom its data are divided; "
            f"leave --clients out, or begin another run: --output"
        )
    return clients or had or CLIENTS

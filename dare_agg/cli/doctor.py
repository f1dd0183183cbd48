"""`dare-agg doctor`: what would keep a run from working here."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

# (name, ok, what was found, what to do)
Check = tuple[str, bool, str, str]


def doctor(
    app: Annotated[
        Path | None, typer.Argument(help="Folder of the Flower app [default: this checkout].")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check versions, ports, bundle and environment; exit 1 when something is wrong."""
    from dare_agg.cli.output import print_json, stdout_console

    checks = [
        result
        for check in (_python, _versions, _devices, _environment, _directory, _port, _disk)
        for result in check()
    ]
    checks += _bundle(app)
    if json_:
        print_json(
            {
                "ok": all(ok for _, ok, _, _ in checks),
                "checks": [
                    {"name": name, "ok": ok, "found": found, "remedy": "" if ok else remedy}
                    for name, ok, found, remedy in checks
                ],
            }
        )
    else:
        console = stdout_console()
        for name, ok, found, remedy in checks:
            mark = "[green]ok[/]  " if ok else "[red]wrong[/]"
            console.print(f"{mark} {name}: {found}" + ("" if ok else f" – {remedy}"))
    raise typer.Exit(0 if all(ok for _, ok, _, _ in checks) else 1)


def _python() -> list[Check]:
    found = sys.version.split()[0]
    return [("python", sys.version_info >= (3, 11), found, "install Python 3.11 or newer")]


def _versions() -> list[Check]:
    from importlib.metadata import PackageNotFoundError, version

    from dare_agg.deploy.packages import is_supported, pip_install

    wanted = {
        "numpy": "dare-agg",
        "cryptography": "dare-agg",
        "flwr": "dare-agg[flower]",
        "ray": "dare-agg[simulation]",
        "torch": "dare-agg[train]",
        "transformers": "dare-agg[train]",
        "matplotlib": "dare-agg[report]",
    }
    checks: list[Check] = []
    for name, extra in wanted.items():
        try:
            found, ok = version(name), True
        except PackageNotFoundError:
            found, ok = "not installed", False
        remedy = f"pip install -c constraints.txt '{extra}'"
        if name == "flwr" and ok:
            ok, remedy = is_supported(name, found), pip_install(name)
        checks.append((name, ok, found, remedy))
    return checks


def _devices() -> list[Check]:
    """What clients can train on; a build of torch with CUDA that sees no GPU is wrong."""
    from dare_agg.deploy.devices import devices_here, torch_build

    build = torch_build()
    if build is None:
        return [("devices", False, "torch is not installed", "see above")]
    made_for = [f"CUDA {build.cuda}"] if build.cuda else []
    made_for += [f"ROCm {build.hip}"] if build.hip else []
    made_for += [f"XPU {build.xpu}"] if build.xpu else []
    here = devices_here()
    found = f"{', '.join(here)}; torch is built for {', '.join(made_for) or 'the CPU alone'}"
    remedy = "look at the driver (nvidia-smi) and at CUDA_VISIBLE_DEVICES"
    return [("devices", bool(len(here) > 1 or not made_for), found, remedy)]


def _environment() -> list[Check]:
    checks: list[Check] = []
    for name, value, why in (
        ("FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", "1", "a SuperLink installs packages"),
        ("FLWR_TELEMETRY_ENABLED", "0", "Flower sends telemetry"),
    ):
        found = os.environ.get(name, "")
        # dare-agg run sets them itself, so a missing one is a hint and no failure.
        hint = f"not set; {why} when you start Flower yourself: export {name}={value}"
        remedy = f"{why}: export {name}={value}"
        checks.append((name, found in ("", value), found or hint, remedy))
    return checks


def _directory() -> list[Check]:
    here = Path.cwd()
    shadow = [name for name in ("client", "server") if (here / name / "app.py").is_file()]
    found = f"{', '.join(shadow)} in {here}" if shadow else "neutral"
    # Ray's actors import from the SuperLink's working directory before the bundle.
    remedy = "start flower-superlink from another folder (dare-agg run does)"
    return [("working directory for flower-superlink", not shadow, found, remedy)]


def _port() -> list[Check]:
    import socket

    with socket.socket() as probe:
        taken = probe.connect_ex(("127.0.0.1", 39091)) == 0
    found = "a managed local SuperLink answers" if taken else "free"
    remedy = "it captures plain flwr runs with its old environment; use dare-agg run, or end it"
    return [("port 39091", not taken, found, remedy)]


def _disk() -> list[Check]:
    import shutil

    free = shutil.disk_usage(Path.cwd()).free
    return [("free disk", free > 2e9, f"{free / 1e9:.1f} GB", "2 GB are needed for a run folder")]


def _bundle(app: Path | None) -> list[Check]:
    from dare_agg.errors import DareError
    from dare_agg.files.app_config import app_project, find_app

    if find_spec("flwr") is None:  # bundles are Flower's
        return [("app", False, "not looked at", "install Flower first, see above")]
    try:
        folder = find_app(app)
        project = app_project(folder)
    except DareError as error:
        return [("app", False, "not found", str(error))]
    include = project["tool"]["flwr"]["app"].get("fab-include", [])
    # In this Python "folder/**" matches folders only.
    patterns = [f"{name}/*" if name.endswith("**") else name for name in include]
    files = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    kept = {path for path in files if path.suffix in (".py", ".toml", ".md", ".json", ".yaml")}
    size = sum(path.stat().st_size for path in kept)
    checks: list[Check] = [
        (
            "bundle",
            bool(kept) and size < 10e6,
            f"{len(kept)} files, {size / 1e6:.2f} MB",
            "fab-include must name server/, client/ and dare_agg/, at most 10 MB",
        ),
        (
            "folder name",
            "_" not in folder.name,
            folder.name,
            "Flower refuses an app folder with an underscore; rename it",
        ),
    ]
    return checks

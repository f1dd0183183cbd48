"""Supported versions of other packages: pyproject.toml says them, once."""

from __future__ import annotations

import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from dare_agg.deploy import packages
from dare_agg.deploy.packages import is_supported, pip_install, supported_versions

ROOT = Path(__file__).parents[2]
LINES = [
    "numpy>=1.26",
    "flwr<1.43,>=1.41; extra == 'flower'",
    "flwr[simulation]<1.43,>=1.41; extra == 'simulation'",
]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "requires", lambda name: LINES)


@pytest.mark.usefixtures("installed")
def test_the_range_is_read_from_our_own_metadata() -> None:
    assert supported_versions("flwr") == ">=1.41,<1.43"
    assert supported_versions("torch") == ""
    assert pip_install("flwr") == "pip install 'flwr>=1.41,<1.43'"


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("found", "fits"),
    [("1.40.2", False), ("1.41.0", True), ("1.42.1", True), ("1.43.0.dev1", False), ("2.0", False)],
)
def test_a_version_is_supported_or_not(found: str, fits: bool) -> None:
    assert is_supported("flwr", found) == fits


def test_code_that_came_in_a_bundle_has_no_range(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> list[str]:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(packages, "requires", missing)
    assert supported_versions("flwr") == "" and is_supported("flwr", "9.9")
    assert pip_install("flwr") == "pip install 'dare-agg[flower]'"


def test_one_range_of_flower_and_the_constraints_on_its_newest() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    flower, simulation = (
        next(Requirement(line) for line in extras[extra] if line.startswith("flwr"))
        for extra in ("flower", "simulation")
    )
    assert flower.specifier == simulation.specifier
    assert version("flwr") in flower.specifier
    pinned = Requirement(
        next(line for line in (ROOT / "constraints.txt").open() if line.startswith("flwr=="))
    )
    (newest,) = (clause.version for clause in pinned.specifier)
    (below,) = (c.version for c in flower.specifier if c.operator == "<")
    major, minor = map(int, below.split("."))
    assert newest in flower.specifier and newest.startswith(f"{major}.{minor - 1}.")

"""Which versions of another package this one is made for: pyproject.toml says it, once.

What it says is read from the installed package's metadata, so that the documents' remedy, the
doctor and a refusal cannot name three ranges.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, requires

OURS = "dare-agg"


def supported_versions(package: str, extra: str = "flower") -> str:
    """The versions of a package that an extra of ours asks for, such as ">=1.41,<1.43".

    "" where nothing says so: the extra does not name it, or our code came with an app's bundle
    and is not installed.
    """
    # Flower brings packaging along; without Flower nobody asks.
    from packaging.requirements import Requirement

    try:
        lines = requires(OURS) or []
    except PackageNotFoundError:
        return ""
    for line in lines:
        wanted = Requirement(line)
        applies = wanted.marker is None or wanted.marker.evaluate({"extra": extra})
        if wanted.name == package and applies:
            return ",".join(sorted(map(str, wanted.specifier), reverse=True))
    return ""


def is_supported(package: str, version: str, extra: str = "flower") -> bool:
    """Whether a version is one of `supported_versions`; all are where nothing says so."""
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(supported_versions(package, extra)).contains(version, prereleases=True)


def pip_install(package: str, extra: str = "flower") -> str:
    """The command that installs a supported version."""
    versions = supported_versions(package, extra)
    return f"pip install '{package}{versions}'" if versions else f"pip install '{OURS}[{extra}]'"

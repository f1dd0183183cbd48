"""Do both ends of a round run the same code? One fingerprint says it.

Everything that decides what an update's bits mean is hashed: whole folders, not a list of
names, so that a file that is added, moved or forgotten cannot fall out of it. The code counts
as Python's parser sees it; comments, docstrings, line ends and formatting do not part a
federation of installed packages.
"""

from __future__ import annotations

import ast
import hashlib
from functools import cache
from pathlib import Path

from dare_agg.codec.update_spec import CODEC_VERSION
from dare_agg.errors import RunError, UpdateError

# The folders of the package that both ends of a round run; below each, every module counts.
SHARED_ROOMS = (
    "codec", "downlink", "flower", "merge", "nvflare", "rounds", "secure", "vectors",
)  # fmt: skip


@cache
def package_fingerprint() -> str:
    """First 16 hex digits of SHA-256 over the code that both ends of a round run.

    A client whose fingerprint differs from the plan's runs other code (another checkout, an
    older install) and refuses to train. Raises `RunError` when part of the package is missing.
    """
    return code_fingerprint(Path(__file__).parents[1])


def check_same_code(codec: object, package: object, theirs: str, ours: str) -> None:
    """Refuse to work with another codec version or another copy of the package.

    ``theirs`` and ``ours`` say who is who in the message. Raises `UpdateError` with reason
    "version" or "package".
    """
    if codec != CODEC_VERSION:
        raise UpdateError(
            f"{theirs} has codec version {str(codec)[:32]}, {ours} {CODEC_VERSION}; install the "
            "same dare-agg on server and clients",
            reason="version",
        )
    if package != package_fingerprint():
        raise UpdateError(
            f"{theirs} runs package {str(package)[:32]}, {ours} {package_fingerprint()}; install "
            "the same dare-agg at both ends, and start Flower's nodes from a neutral directory so "
            "that they load the code of the bundle",
            reason="package",
        )


def code_fingerprint(package: Path) -> str:
    """The fingerprint of the copy of this package in the folder ``package``.

    The same on every Python version, and for files that differ in comments, docstrings or
    formatting only. Raises `RunError` for a folder that is missing or holds no module.
    """
    digest = hashlib.sha256(b"dare-agg package 2\0")
    for room in SHARED_ROOMS:
        files = sorted((package / room).glob("*.py" if room == "." else "**/*.py"))
        if not files:
            raise RunError(
                f"{str(package / room)!r} holds no module: this copy of dare-agg is not whole; "
                "install it again, or put dare_agg/** into the app's fab-include"
            )
        for path in files:
            digest.update(path.relative_to(package).as_posix().encode() + b"\0")
            digest.update(_code_digest(path.read_bytes()))
    return digest.hexdigest()[:16]


def _code_digest(source: bytes) -> bytes:
    """SHA-256 of a module's syntax tree without its docstrings."""
    words: list[str] = []
    _write(ast.parse(source), words)
    return hashlib.sha256("\0".join(words).encode()).digest()


def _write(node: ast.AST, words: list[str]) -> None:
    """Append the tree below ``node`` as words: kinds of nodes, fields and constants.

    ``ast.dump`` differs between Python versions, which add fields and leave out empty ones: so
    only the fields that hold something count here, and not a string's prefix.
    """
    words.append(type(node).__name__)
    if isinstance(node, ast.Constant):
        words.append(repr(node.value))
        return
    for name in node._fields:
        value = getattr(node, name, None)
        if value is None or value == []:
            continue
        words.append(name)
        if isinstance(value, ast.AST):
            _write(value, words)
        elif isinstance(value, list):
            words.append("[")
            for part in value[1:] if name == "body" and _has_docstring(node) else value:
                if isinstance(part, ast.AST):
                    _write(part, words)
                else:
                    words.append(repr(part))
            words.append("]")
        else:
            words.append(repr(value))
    words.append(")")


def _has_docstring(node: ast.AST) -> bool:
    if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return False
    first = node.body[0]
    return (
        isinstance(first, ast.Expr)
        and isinstance(first.value, ast.Constant)
        and isinstance(first.value.value, str)
    )

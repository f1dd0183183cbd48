"""The fingerprint of the code that both ends of a round run: nothing falls out of it."""

import shutil
from pathlib import Path

import pytest

import dare_agg
from dare_agg.codec.update_spec import CODEC_VERSION
from dare_agg.errors import RunError, UpdateError
from dare_agg.rounds.same_code import (
    SHARED_ROOMS,
    check_same_code,
    code_fingerprint,
    package_fingerprint,
)

PACKAGE = Path(dare_agg.__file__).parent


def shared_files() -> list[str]:
    """Every module below the shared rooms, as a path within the package."""
    return sorted(
        path.relative_to(PACKAGE).as_posix()
        for room in SHARED_ROOMS
        for path in (PACKAGE / room).glob("*.py" if room == "." else "**/*.py")
    )


@pytest.fixture
def small_copy(tmp_path):
    """The package's tree of modules, each with one constant in place of its code."""
    for name in shared_files():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("CONSTANT = 1\n")
    return tmp_path


def test_a_changed_constant_in_any_file_changes_the_fingerprint(small_copy):
    before = code_fingerprint(small_copy)
    assert len(shared_files()) > 60
    for name in shared_files():
        (small_copy / name).write_text("CONSTANT = 2\n")
        assert code_fingerprint(small_copy) != before, name
        (small_copy / name).write_text("CONSTANT = 1\n")
    assert code_fingerprint(small_copy) == before


def test_a_file_added_or_renamed_changes_the_fingerprint(small_copy):
    before = code_fingerprint(small_copy)
    (small_copy / "merge" / "another.py").write_text("")
    added = code_fingerprint(small_copy)
    (small_copy / "merge" / "another.py").rename(small_copy / "merge" / "renamed.py")
    assert len({before, added, code_fingerprint(small_copy)}) == 3


def test_what_decides_the_bits_is_in_it():
    stems = {Path(name).stem for name in shared_files()}
    assert {"layout", "mask", "rotation", "derive", "ties", "mod", "transport"} <= stems


@pytest.mark.parametrize("room", SHARED_ROOMS)
def test_a_missing_room_is_an_error(small_copy, room):
    if room == ".":
        for path in small_copy.glob("*.py"):
            path.unlink()
    else:
        shutil.rmtree(small_copy / room)
    with pytest.raises(RunError, match="not whole"):
        code_fingerprint(small_copy)


def test_comments_docstrings_and_layout_do_not_count(small_copy):
    path = small_copy / "merge" / "ties.py"
    path.write_text('"""A docstring."""\n\ndef f(a, b=1):\n    """Another."""\n    return a + b\n')
    before = code_fingerprint(small_copy)
    path.write_bytes(
        b"# a comment\r\n\r\ndef f(\r\n    a,\r\n    b = 1,  # more\r\n):\r\n    return (a + b)\r\n"
    )
    assert code_fingerprint(small_copy) == before
    path.write_text("def f(a, b=1):\n    return a - b\n")
    assert code_fingerprint(small_copy) != before


def test_text_that_is_no_docstring_counts(small_copy):
    path = small_copy / "merge" / "ties.py"
    path.write_text('A = 1\n"""not a docstring"""\nf = "x"\n')
    before = code_fingerprint(small_copy)
    path.write_text('A = 1\n"""not a docstring"""\nf = "y"\n')
    assert code_fingerprint(small_copy) != before


def test_other_code_is_refused_with_its_reason():
    check_same_code(CODEC_VERSION, package_fingerprint(), "a", "b")
    with pytest.raises(UpdateError, match="codec version 99") as caught:
        check_same_code(99, package_fingerprint(), "the server", "this client")
    assert caught.value.reason == "version"
    with pytest.raises(UpdateError, match="neutral directory") as caught:
        check_same_code(CODEC_VERSION, "0" * 16, "the server", "this client")
    assert caught.value.reason == "package"

"""Patterns of names: what they find, and that none of them can keep a core busy."""

import subprocess
import sys

import pytest

from dare_agg.errors import LayoutError
from dare_agg.vectors.patterns import MAX_PATTERN, compile_patterns, matches


@pytest.mark.parametrize(
    ("pattern", "name", "found"),
    [
        (r"^head\.", "head.weight", True),
        (r"^head\.", "encoder.head.weight", False),
        (r"layer\.(0|11)\.", "encoder.layer.11.q", True),
        ("bias$", "encoder.bias", True),
        ("(?i)LAYER", "encoder.layer", True),
        ("", "anything", True),
    ],
)
def test_found_anywhere_as_pythons_search(pattern, name, found):
    assert matches(name, compile_patterns([pattern])) is found


@pytest.mark.parametrize(
    ("pattern", "why"),
    [("(", "missing"), (r"(a)\1", "back-references"), ("(?=a)", "look-around"), ("[z-a]", "range"),
     ("x{1000}{1000}", "repetition"), ("a" * (MAX_PATTERN + 1), "at most 1000")],
)  # fmt: skip
def test_what_is_no_pattern_is_refused_by_its_name(pattern, why, capfd):
    with pytest.raises(LayoutError, match=why):
        compile_patterns([pattern])
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "pattern", [r"^(\w+\.?)+!$", "(a+)+$", "(a|a)*b", "(.*a){25}", r"(x+x+)+y", "a{1,1000}b"]
)
def test_a_pattern_that_never_ended(pattern):
    """Each took Python's engine hours for one of these names; a process of its own, to be ended."""
    script = (
        "import sys\n"
        "from dare_agg.vectors.patterns import compile_patterns, matches\n"
        "for name in ('a' * 5000 + '?', 'x' * 5000, 'ab.' * 2000):\n"
        "    matches(name, compile_patterns(sys.argv[1:]))\n"
    )
    subprocess.run([sys.executable, "-c", script, pattern], check=True, timeout=30)

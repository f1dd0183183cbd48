"""JSON from outside is read within bounds, and in one place."""

import ast
import json
from pathlib import Path

import pytest

from dare_agg.errors import DareError, FormatError
from dare_agg.files.json_text import MOST_DEPTH, parse_json, read_json

ROOT = Path(__file__).resolve().parents[2]


def nested(depth: int) -> str:
    """Objects and arrays in turn."""
    text = "1"
    for level in range(depth):
        text = f"[{text}]" if level % 2 else f'{{"a":{text}}}'
    return text


@pytest.mark.parametrize(
    "value",
    [
        {}, [], None, 1.5, "", "[" * 1000, {"{[,\\\"": ["]}", "\\", "\\\\\"["] * 100},
        {"emoji": "😀"}, {"list": [[i, [i]] for i in range(1000)]}, float("inf"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("plain", [True, False])
def test_what_json_reads_is_read(value: object, plain: bool) -> None:
    text = json.dumps(value, ensure_ascii=plain)
    assert parse_json(text) == parse_json(text.encode()) == value


def test_depth_is_bounded_exactly() -> None:
    assert parse_json(nested(MOST_DEPTH)) == json.loads(nested(MOST_DEPTH))
    wide = "[" + ",".join(["[[]]"] * 100) + "]"
    assert parse_json(wide) == json.loads(wide)
    for text in (nested(MOST_DEPTH + 1), "[" + ",".join([nested(MOST_DEPTH)] * 3) + "]"):
        with pytest.raises(FormatError, match="nested more than 64"):
            parse_json(text)


def test_size_and_number_of_values_are_bounded(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="at most 10 are read"):
        parse_json('"0123456789"', most=10)
    assert parse_json("[1,2,3]", cost=7) == [1, 2, 3]
    with pytest.raises(FormatError, match="too many values"):
        parse_json("[1,2,3,4]", cost=7)
    assert parse_json('["' + "," * 50 + '"]', cost=7) == ["," * 50]
    (tmp_path / "x").write_text("[" + " " * 100 + "]")
    with pytest.raises(FormatError, match="larger than 50 bytes"):
        read_json(tmp_path / "x", most=50)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[" * 10**6, "]" * 10**6, "[}" * 10**5, '"' * 10**5, '"\\' * 10**5, '"\\ud800"',
     '{"\\udc00": 1}', b"\xff\xfe[\x00]\x00", b"\xef\xbb\xbf[]", "9" * 5000, "[1] 2", b"\xff"],
)  # fmt: skip
def test_what_is_no_json_is_one_kind_of_error(text: str | bytes) -> None:
    with pytest.raises(FormatError) as caught:
        parse_json(text)
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, DareError)
    assert caught.value.reason == "format"


def test_keys_that_stand_twice_are_refused_on_demand() -> None:
    assert parse_json('{"a": 1, "a": 2}') == {"a": 2}
    with pytest.raises(FormatError, match="'a' stands twice"):
        parse_json('[{"a": 1, "a": 2}]', unique=True)


def test_half_a_pair_passes_where_the_caller_looks() -> None:
    assert parse_json('"\\ud800"', any_text=True) == "\ud800"
    assert parse_json('"\\ud83d\\ude00"') == "😀"


def test_nothing_else_parses_json_or_yaml() -> None:
    own = {"dare_agg/files/json_text.py", "dare_agg/offline/yaml_text.py"}
    found = []
    for room in ("dare_agg", "server", "client"):
        for path in sorted((ROOT / room).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                    call = (node.value.id, node.attr)
                    parses = call[0] in ("json", "yaml") and call[1] in (
                        "load", "loads", "JSONDecoder", "safe_load", "load_all", "full_load",
                    )  # fmt: skip
                    if parses and str(path.relative_to(ROOT)) not in own:
                        found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not found

"""Small files that would take minutes or gigabytes to read: refused by name, within bounds.

Each reader runs in a process of its own that may take 64 MB and a few seconds of CPU more than
it has when it begins; beyond them it dies without the error that is waited for.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dare_agg.checkpoint import open_checkpoint
from dare_agg.errors import CheckpointError

ROOT = Path(__file__).resolve().parents[3]
Read = Callable[[str, Path], str]
# One process imports what reads, and makes of itself a process for each file.
READ = """
import json, os, resource, sys
from pathlib import Path
import numpy, yaml
from cryptography.hazmat.primitives.asymmetric import ed25519
from dare_agg.errors import DareError
from dare_agg.checkpoint import open_checkpoint
from dare_agg.cli.progress import load_rows
from dare_agg.cli.run_config import resumed_config
from dare_agg.codec.update_file import read_update_file
from dare_agg.deploy.identities import read_identities
from dare_agg.downlink.base import read_base
from dare_agg.offline.adapters.folder import adapter_base
from dare_agg.offline.range_check import bases_named_by
from dare_agg.offline.recipe_file import read_recipe
from dare_agg.runs.report.records import read_run
from dare_agg.secure.identity import read_public
from dare_agg.secure.roster import read_roster
import safetensors.numpy
def read(reader, path):
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + (64 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime) + 4
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    try:
        found = eval(reader)
        return "read " + str(found)[:100]
    except DareError as error:
        return type(error).__name__ + " " + str(error)[:300]

for line in sys.stdin:
    reader, path = json.loads(line)
    if not (child := os.fork()):
        print(json.dumps(read(reader, Path(path))), flush=True)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps(status), flush=True)
"""


@pytest.fixture(scope="module")
def read() -> Iterator[Read]:
    """Reads a file by an expression of ``path``; returns what was read or the error."""
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            [sys.executable, "-c", READ], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=errors, text=True, cwd=ROOT,
        ) as process,
    ):  # fmt: skip
        assert process.stdin and process.stdout
        asked, told = process.stdin, process.stdout

        def one(reader: str, path: Path) -> str:
            print(json.dumps([reader, str(path)]), file=asked, flush=True)
            found = json.loads(told.readline() or '"nothing"')
            if not isinstance(found, str):
                errors.seek(0)
                raise AssertionError((found, errors.read()[-2000:]))
            assert json.loads(told.readline()) == 0
            return found.strip()

        yield one
        asked.close()


def deep(left: str = "[", right: str = "]", count: int = 100_000) -> str:
    return left * count + right * count


def safetensors(header: str | dict, body: bytes = b"") -> bytes:
    text = header.encode() if isinstance(header, str) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def tensor(start: int, stop: int, shape: list, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def empty_tensors(count: int) -> bytes:
    row = '"t%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return safetensors("{" + ",".join(row % i for i in range(count)) + "}")


def update(tensors: str) -> bytes:
    text = ('{"base":"","tensors":' + tensors + "}").encode()
    return b"DAREFILE" + (1).to_bytes(4, "little") + len(text).to_bytes(4, "little") + text


def aliases(levels: int) -> str:
    lines = ["l0: &l0 [" + ", ".join("x" * 10) + "]"]
    lines += [f"l{i}: &l{i} [" + ", ".join([f"*l{i - 1}"] * 10) + "]" for i in range(1, levels)]
    return "\n".join([*lines, f"models: *l{levels - 1}\n"])


CHECKPOINT, UPDATE = "open_checkpoint(path)", "read_update_file(path)"
# Reader, file name, content, and the error's beginning and words.
BOMBS: dict[str, tuple[str, str, Callable[[], str | bytes], str, str]] = {
    "a million empty tensors": (
        CHECKPOINT, "m.safetensors", lambda: empty_tensors(1_000_000), "CheckpointError", "shards",
    ),
    "as many as the header may hold": (
        CHECKPOINT, "m.safetensors", lambda: empty_tensors(250_000), "CheckpointError", "shards",
    ),
    "a million objects under escaped names": (
        CHECKPOINT, "m.safetensors",
        lambda: safetensors("{" + ",".join(f'"{i}":{{}}' for i in range(1_000_000)) + "}"),
        "CheckpointError", "tensors in one file",
    ),
    "metadata of lists": (
        CHECKPOINT, "m.safetensors",
        lambda: safetensors('{"__metadata__":[' + ",".join(["[]"] * 5_000_000) + "]}"),
        "CheckpointError", "too many values",
    ),
    "a deep header": (
        CHECKPOINT, "m.safetensors", lambda: safetensors('{"w":' + deep() + "}"),
        "CheckpointError", "nested more than 64",
    ),
    "a base of a million tensors": (
        "read_base(path)", "b.safetensors", lambda: empty_tensors(1_000_000), "StateError",
        "shards",
    ),
    "a deep index": (
        "open_checkpoint(path.parent)", "model.safetensors.index.json",
        lambda: '{"weight_map":' + deep() + "}", "CheckpointError", "is no index",
    ),
    "an index of five million values": (
        "open_checkpoint(path.parent)", "model.safetensors.index.json",
        lambda: '{"weight_map":[' + ",".join(["[]"] * 5_000_000) + "]}", "CheckpointError",
        "values",
    ),
    "an update of a million tensors": (
        UPDATE, "x.dare", lambda: update("[" + ",".join(['["a","F32",[0]]'] * 1_000_000) + "]"),
        "UpdateError", "",
    ),
    "a deep update": (UPDATE, "x.dare", lambda: update(deep()), "UpdateError", "no JSON"),
    "aliases of aliases": (
        "read_recipe(path)", "r.yaml", lambda: aliases(9), "ConfigError", "expands to more than",
    ),
    "an alias of itself": (
        "read_recipe(path)", "r.yaml", lambda: "a: &a [*a]", "ConfigError", "for itself",
    ),
    "a deep recipe in YAML": (
        "read_recipe(path)", "r.yaml", lambda: "a: " + deep(), "ConfigError", "nested more than 64",
    ),
    "a number in base 60": (
        "read_recipe(path)", "r.yaml", lambda: "a: 1" + ":01" * 80_000, "ConfigError", "quote what",
    ),
    "a deep recipe in JSON": (
        "read_recipe(path)", "r.json", lambda: '{"a":' + deep() + "}", "ConfigError", "nested",
    ),
    "a deep recipe in TOML": (
        "read_recipe(path)", "r.toml", lambda: "a = " + deep(), "ConfigError", "recursion",
    ),
    "a deep key in TOML": (
        "read_recipe(path)", "r.toml", lambda: ".".join("a" * 90_000) + " = 1", "ConfigError",
        "dotted",
    ),
    "a gigantic recipe": (
        "read_recipe(path)", "r.yaml", lambda: "- x\n" * 20_000_000, "ConfigError", "larger than",
    ),
    "thousands of models of mergekit's": (
        "read_recipe(path)", "r.yaml",
        lambda: "merge_method: ties\nmodels:\n" + "".join(
            f"- model: a/b{i}\n" for i in range(4000)
        ),
        "ConfigError", "needs a base_model",
    ),
    "a deep roster": ("read_roster(path)", "r.json", deep, "StateError", "is no roster"),
    "a deep public key": ("read_public(path)", "a.pub", deep, "StateError", "is no key file"),
    "deep identities": ("read_identities(path)", "i.json", deep, "ConfigError", "cannot be read"),
    "a deep adapter": (
        "adapter_base(path.parent)", "adapter_config.json", deep, "CheckpointError", "cannot",
    ),
    "a deep run to resume": ("resumed_config(path.parent)", "run.json", deep, "StateError", "run"),
    "a deep row in a report": (
        "read_run(path.parent)", "metrics.jsonl", lambda: deep() + "\n{}\n", "StateError", "line 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BOMBS)
def test_a_bomb_is_refused_by_name(read: Read, tmp_path: Path, what: str) -> None:
    reader, name, content, kind, words = BOMBS[what]
    made = content()
    (tmp_path / name).write_bytes(made.encode() if isinstance(made, str) else made)
    told = read(reader, tmp_path / name)
    assert told.startswith(kind + " ") and words in told, told


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("README.md", "---\n" + aliases(9) + "---\n"),
        ("README.md", "---\na: " + deep() + "\n---\n"),
        ("config.json", deep()),
    ],
)
def test_what_only_a_hint_is_read_from_is_passed_over(read, tmp_path, name, content) -> None:
    (tmp_path / name).write_text(content)
    assert read("bases_named_by([path.parent])", tmp_path / name) == "read"


FOUR = np.arange(4, dtype="<f4").tobytes()
MALFORMED = {
    "a key twice": (
        '{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},'
        '"w":{"dtype":"F32","shape":[4],"data_offsets":[16,32]}}',
        FOUR * 2, "'w' stands twice",
    ),
    "a hole": ({"a": tensor(0, 16, [4]), "b": tensor(20, 36, [4])}, FOUR + b"hide" + FOUR, "hole"),
    "a hole before": ({"a": tensor(4, 20, [4])}, b"hide" + FOUR, "leaves a hole of 4 bytes"),
    "bytes after": ({"a": tensor(0, 16, [4])}, FOUR + b"hide", "4 bytes after the last tensor"),
    "an overlap": ({"a": tensor(0, 16, [4]), "b": tensor(8, 24, [4])}, FOUR * 2, "overlaps"),
    "no such array": ({"a": tensor(0, 0, [2**62, 2**62, 0])}, b"", "shape of more than"),
    "no such array, zero first": ({"a": tensor(0, 0, [0, 2**62, 4])}, b"", "shape of more than"),
    "shape of texts": ({"a": tensor(0, 16, ["4"])}, FOUR, "not whole numbers"),
    "shape of truths": ({"a": tensor(0, 4, [True])}, FOUR[:4], "not whole numbers"),
    "shape of fractions": ({"a": tensor(0, 16, [4.0])}, FOUR, "not whole numbers"),
    "negative shape": ({"a": tensor(0, 16, [-2, -2])}, FOUR, "not whole numbers"),
    "offset infinite": (
        '{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,Infinity]}}', FOUR, "whole numbers",
    ),
    "another field": ({"a": {**tensor(0, 16, [4]), "x": 1}}, FOUR, "has not the fields"),
    "half a surrogate pair": ({"\ud800": tensor(0, 16, [4])}, FOUR, "surrogates"),
    "a name of controls": ({"\x1b[31m": tensor(0, 16, [4])}, FOUR, "control characters"),
    "a name that climbs": ({"../../x": tensor(0, 16, [4])}, FOUR, "out of its folder"),
    "metadata of numbers": ({"__metadata__": {"a": 1}, "a": tensor(0, 16, [4])}, FOUR, "metadata"),
}  # fmt: skip


@pytest.mark.parametrize("what", MALFORMED)
def test_a_malformed_header_is_refused(tmp_path: Path, what: str) -> None:
    header, body, words = MALFORMED[what]
    (tmp_path / "m.safetensors").write_bytes(safetensors(header, body))
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(tmp_path / "m.safetensors")


@pytest.mark.parametrize("what", ["a key twice", "a hole", "a hole before", "bytes after"])
def test_safetensors_refuses_those_too(tmp_path: Path, what: str) -> None:
    header, body, _ = MALFORMED[what]
    (tmp_path / "m.safetensors").write_bytes(safetensors(header, body))
    with pytest.raises(Exception, match="deserializing header"):
        load_file(tmp_path / "m.safetensors")


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    arrays = {
        "a": np.ones((2, 3), np.float32), "empty": np.ones((0, 3), np.float32),
        "scalar": np.ones((), np.float32), "naïve 😀": np.arange(5, dtype=np.int64),
        "b": np.ones(3, np.float16),
    }  # fmt: skip
    save_file(arrays, tmp_path / "m.safetensors", {"format": "pt", "json": '{"[,{": "\\"x,["}'})
    found = open_checkpoint(tmp_path / "m.safetensors")
    assert found.shapes == {name: array.shape for name, array in arrays.items()}
    assert found.metadata["json"] == '{"[,{": "\\"x,["}'


def test_aliases_as_people_use_them_are_read(tmp_path: Path) -> None:
    from dare_agg.offline.recipe_file import read_recipe

    (tmp_path / "r.yaml").write_text(
        "base: b\nmodels:\n- &a {path: x, weight: 1}\n- {<<: *a, path: y}\nexclude: &e ['^h']\n"
    )
    models = read_recipe(tmp_path / "r.yaml").values["models"]
    assert [Path(m["path"]).name for m in models] == ["x", "y"] and models[1]["weight"] == 1

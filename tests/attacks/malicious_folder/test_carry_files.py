"""A stranger's model folder brings code along, or has secrets of this machine copied out."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from dare_agg.checkpoint import carry_files, write_checkpoint
from dare_agg.cli.main import main
from dare_agg.codec.mask import parse_drop_rate
from dare_agg.offline.diff import write_diff
from dare_agg.secure.own_model import open_own

KNOWN = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "source.spm", "qwen.tiktoken",
    "tekken.json", "unigram.json", "chat_template.jinja", "additional_chat_templates/tools.jinja",
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json",
    "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors",
    "LICENSE", "LICENSE.txt", "NOTICE", "head.safetensors", "provenance.json",
)  # fmt: skip
UNKNOWN = (
    ".env", ".netrc", "state.pkl", "adapter.pickle", "training_args.bin", "id_rsa", "notes.json",
    "run.sh", "config.json.bak", "x.tokenizer.json.exe", "gensim.model", "1_Pooling/hook.pkl",
    "1_Pooling/model.bin", "config.jsоn",
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base whose files an attacker chose."""
    model(tmp_path / "base", 0)
    return tmp_path / "base"


def model(path: Path, seed: int) -> Path:
    values = np.random.default_rng(seed).normal(0, 0.01, (8, 8)).astype(np.float32)
    write_checkpoint(path, {"w": values})
    return path


def put(folder: Path, name: str, text: str = "{}") -> Path:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def merge(folder: Path, *words: str) -> Path:
    """Merge two models over the folder with the command."""
    out = folder.parent / "out"
    others = [str(model(folder.parent / name, seed)) for seed, name in enumerate("ab", 1)]
    with pytest.raises(SystemExit) as stop:
        main(["merge", str(folder), *others, "-o", str(out), "--json", *words])
    assert stop.value.code == 0
    return out


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def left(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    found = json.loads(capsys.readouterr().out)["left"]
    return {one["file"]: one["why"] for one in found}


def test_a_list_of_known_names_and_nothing_else(folder: Path, capsys) -> None:
    for name in (*KNOWN, *UNKNOWN):
        put(folder, name, "[]" if name == "modules.json" else "{}")
    put(folder, ".git/config")
    put(folder, "onnx/model.onnx")
    put(folder, "README.md", "the base's card")
    out = merge(folder)
    assert names(out) == {*KNOWN, "model.safetensors", "README.md"}
    assert "merged by" in (out / "README.md").read_text()
    told = left(capsys)
    assert set(told) == {
        *(name for name in UNKNOWN if name.isascii()), "config.jsоn", ".git/", "onnx/",
    }  # fmt: skip
    assert told[".env"] == "not known to belong to a model"


def test_a_secret_behind_a_link_stays_where_it_is(folder: Path, tmp_path, capsys) -> None:
    secret = put(tmp_path, "id_rsa", "SECRET")
    secret.chmod(0o600)
    outside = tmp_path / "outside"
    put(outside, "config.json", "SECRET")
    (folder / "tokenizer.json").symlink_to(secret)
    (folder / "vocab.txt").symlink_to("../id_rsa")
    (folder / "hop").symlink_to(tmp_path)
    (folder / "merges.txt").symlink_to("hop/id_rsa")
    (folder / "1_Pooling").symlink_to(outside)
    (folder / "config.json").symlink_to("nowhere")
    (folder / "spiece.model").symlink_to("spiece.model")
    (folder / "dict.txt").symlink_to("/proc/self/environ")
    os.mkfifo(folder / "NOTICE")
    put(folder, "real.txt", "a vocabulary of its own")
    (folder / "vocab.bpe").symlink_to("real.txt")
    out = merge(folder)
    assert names(out) == {"model.safetensors", "README.md", "vocab.bpe"}
    assert not any(path.is_symlink() for path in out.rglob("*"))
    told = left(capsys)
    for name in ("tokenizer.json", "vocab.txt", "merges.txt", "dict.txt"):
        assert told[name] == "a link that leaves the folder: copy what it names into it"
    assert told["NOTICE"] == "no regular file" and told["1_Pooling/"].startswith("not known")
    assert "cannot be read" in told["config.json"] and "cannot be read" in told["spiece.model"]


def snapshot(cache: Path) -> Path:
    """A model as Hugging Face's cache keeps it."""
    blobs, revision = cache / "models--org--m" / "blobs", cache / "models--org--m/snapshots/abc"
    for name, text in (
        ("model.safetensors", ""),
        ("tokenizer.json", "{}"),
        ("1_Pooling/config.json", "{}"),
    ):
        blob = blobs / name.replace("/", "-")
        blob.parent.mkdir(parents=True, exist_ok=True)
        if text:
            blob.write_text(text)
        else:
            model(revision.parent / "made", 0)
            (revision.parent / "made" / name).rename(blob)
        link = revision / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return revision


def test_the_links_of_hugging_faces_cache_are_the_model(tmp_path: Path, capsys) -> None:
    revision = snapshot(tmp_path)
    alias = tmp_path / "alias"
    alias.symlink_to(revision)
    for path in (revision, alias):
        (tmp_path / path.name).mkdir(exist_ok=True)
        target = tmp_path / f"copy of {path.name}"
        target.mkdir()
        carried = carry_files(path, target, skip=("model.safetensors",))
        assert set(carried.files) == {"tokenizer.json", "1_Pooling/config.json"}
        assert not carried.left
    out = merge(revision)
    assert names(out) >= {"tokenizer.json", "1_Pooling/config.json", "model.safetensors"}


@pytest.mark.parametrize("how", ["a blob that is a link", "blobs that lead away", "another model"])
def test_a_folder_that_only_looks_like_that_cache(tmp_path: Path, how: str) -> None:
    secret = put(tmp_path / "home", "secret", "SECRET")
    revision = snapshot(tmp_path)
    blobs = tmp_path / "models--org--m" / "blobs"
    if how == "a blob that is a link":
        (blobs / "tokenizer.json").unlink()
        (blobs / "tokenizer.json").symlink_to(secret)
    elif how == "blobs that lead away":
        blobs.rename(tmp_path / "blobs")
        put(tmp_path / "home", "tokenizer.json", "SECRET")
        blobs.symlink_to(tmp_path / "home")
    else:
        (tmp_path / "models--org--private").mkdir()
        other = put(tmp_path / "models--org--private" / "blobs", "x", "SECRET")
        (revision / "tokenizer.json").unlink()
        (revision / "tokenizer.json").symlink_to(other)
    (tmp_path / "out").mkdir()
    carried = carry_files(revision, tmp_path / "out", skip=("model.safetensors",))
    assert "tokenizer.json" in {one.file for one in carried.left}
    assert "SECRET" not in "".join(
        p.read_text() for p in (tmp_path / "out").rglob("*") if p.is_file()
    )


def test_no_file_becomes_readable_for_more_people(folder: Path) -> None:
    for name, mode in (("vocab.txt", 0o600), ("merges.txt", 0o444), ("LICENSE", 0o755)):
        put(folder, name).chmod(mode)
    before = os.umask(0)
    try:
        out = merge(folder)
    finally:
        os.umask(before)
    modes = {n: (out / n).stat().st_mode & 0o777 for n in ("vocab.txt", "merges.txt", "LICENSE")}
    assert modes == {"vocab.txt": 0o600, "merges.txt": 0o644, "LICENSE": 0o644}


CODE = {
    "config.json": {"model_type": "x", "auto_map": {"AutoModel": "modeling_evil.Evil"}},
    "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "chat": "ü"},
    "preprocessor_config.json": {"sub": [{"auto_map": {"AutoImageProcessor": "evil.Evil"}}]},
    "generation_config.json": {"custom_pipelines": {"evil": {"impl": "evil.Evil"}}},
    "modules.json": [{"idx": 0, "path": "", "type": "evil.Transformer"}],
}


def test_code_stays_behind_and_what_names_it_is_dropped(folder: Path, capsys) -> None:
    for name, value in CODE.items():
        put(folder, name, json.dumps(value))
    put(folder, "modeling_evil.py", "import os")
    out = merge(folder)
    assert names(out) == {"model.safetensors", "README.md", *CODE} - {"modules.json"}
    assert json.loads((out / "config.json").read_text()) == {"model_type": "x"}
    assert json.loads((out / "tokenizer_config.json").read_text()) == {"chat": "ü"}
    assert "evil" not in "".join((out / n).read_text() for n in CODE if n != "modules.json")
    told = left(capsys)
    assert told["modeling_evil.py"] == "code: --carry-code takes it along"
    assert told["config.json: auto_map"] == "it names code: --carry-code keeps it"
    assert "preprocessor_config.json: auto_map" in told
    assert "generation_config.json: custom_pipelines" in told
    assert "'evil.Transformer'" in told["modules.json"]


def test_code_goes_along_where_it_is_asked_for(folder: Path, capsys) -> None:
    for name, value in CODE.items():
        put(folder, name, json.dumps(value))
    put(folder, "modeling_evil.py", "import os")
    put(folder, ".env")
    out = merge(folder, "--carry-code")
    assert names(out) == {"model.safetensors", "README.md", "modeling_evil.py", *CODE}
    assert all((out / name).read_bytes() == (folder / name).read_bytes() for name in CODE)
    assert set(left(capsys)) == {".env"}


def test_what_names_no_code_is_copied_bit_for_bit(folder: Path) -> None:
    text = '{"b": 1,   "a": 1e5, "a": "\\u00fc"}'
    put(folder, "config.json", text)
    types = ["sentence_transformers.models.Transformer", "sentence_transformers.models.Pooling"]
    modules = json.dumps([{"type": t} for t in types])
    put(folder, "modules.json", modules)
    out = merge(folder)
    assert (out / "config.json").read_text() == text
    assert (out / "modules.json").read_text() == modules


@pytest.mark.parametrize("text", ["{", "[" * 200_000 + "]" * 200_000])
def test_a_configuration_that_cannot_be_searched_stays(folder: Path, capsys, text: str) -> None:
    put(folder, "config.json", text)
    out = merge(folder)
    assert names(out) == {"model.safetensors", "README.md"}
    assert "cannot be searched for code" in left(capsys)["config.json"]


def test_apply_carries_by_the_same_rules(folder: Path, tmp_path: Path, capsys) -> None:
    put(folder, "config.json", json.dumps(CODE["config.json"]))
    put(folder, "evil.py")
    put(folder, "\x1b[31mred\n.env")
    put(folder, "README.md", "the base's card")
    write_diff(
        folder, model(tmp_path / "a", 1), tmp_path / "x.dare", drop_rate=parse_drop_rate("0.5")
    )
    for number, words in enumerate(([], ["--carry-code"])):
        out = tmp_path / f"o{number}"
        with pytest.raises(SystemExit) as stop:
            main(["apply", str(folder), str(tmp_path / "x.dare"), "-o", str(out), "--json", *words])
        assert stop.value.code == 0
        assert (
            ("evil.py" in names(out))
            == bool(words)
            == ("auto_map" in (out / "config.json").read_text())
        )
        told = left(capsys)
        assert told["README.md"] == "it describes another model" and "\\x1b[31mred\\n.env" in told


def test_people_are_told_in_a_few_lines(folder: Path, capsys) -> None:
    for number in range(20):
        put(folder, f"{number:02}.pkl")
    put(folder, "evil.py")
    out = folder.parent / "out"
    with pytest.raises(SystemExit):
        main(["merge", str(folder), str(model(folder.parent / "a", 1)), "-o", str(out)])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("left: ")]
    assert len(lines) == 2
    assert lines[0].endswith("07.pkl and 12 more (not known to belong to a model)")
    assert lines[1] == "left: evil.py (code: --carry-code takes it along)"


def test_the_heads_of_the_models_are_not_lost_without_a_word(folder: Path, capsys) -> None:
    put(model(folder.parent / "a", 1), "head.safetensors", "A")
    (folder.parent / "a" / "model.safetensors").rename(folder.parent / "kept")
    (folder.parent / "kept").rename(folder.parent / "a" / "model.safetensors")
    out = folder.parent / "out"
    with pytest.raises(SystemExit):
        main(["merge", str(folder), str(folder.parent / "a"), "-o", str(out), "--json"])
    assert "copy the one you need" in left(capsys)[str(folder.parent / "a" / "head.safetensors")]


def test_a_party_gets_back_what_it_brought(folder: Path, tmp_path: Path) -> None:
    mine = model(tmp_path / "mine", 1)
    for name in (
        "head.safetensors",
        "README.md",
        "labels.txt",
        "modeling_mine.py",
        "1_Pooling/config.json",
    ):
        put(mine, name, "mine")
    put(mine, "pytorch_model.bin", "stale")
    put(mine, "config.json", json.dumps(CODE["config.json"]))
    own = open_own(folder, mine)
    own.write_merged(tmp_path / "merged", own.delta() * 0)
    assert names(tmp_path / "merged") == names(mine) - {"pytorch_model.bin"}
    for name in names(mine) - {"pytorch_model.bin", "model.safetensors"}:
        assert (tmp_path / "merged" / name).read_bytes() == (mine / name).read_bytes()

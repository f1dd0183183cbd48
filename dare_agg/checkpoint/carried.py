"""What else of a model folder goes along with its weights: files known to belong to a model.

A folder may come from anyone. So what is carried is a list of known names, not all but some:
a token in ``.env``, a pickle or a script stays where it is. A link that leaves the folder is
refused, since what it names (a key, say) would be copied out; Hugging Face's cache, whose
snapshots are links into the blobs beside them, is told apart. References to code that
``transformers`` would run (``auto_map``) are dropped with the code unless it is asked for.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from dare_agg.checkpoint.reader import INDEX_NAME
from dare_agg.checkpoint.stand_ins import LFS_POINTER, is_lfs_pointer
from dare_agg.checkpoint.writer import unwritable
from dare_agg.errors import FormatError
from dare_agg.files.json_text import MOST_BYTES, parse_json

CARD, HEAD_NAME = "README.md", "head.safetensors"
# Regular expressions of whole names, by what the files are. Tokenizers: fast, WordPiece, BPE,
# SentencePiece, tiktoken, Mistral's, translation models'.
_TOKENIZER = (
    r"tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json",
    r"vocab\.(json|txt|bpe)|vocab-(src|tgt)\.json|(source|target)_vocab\.json|vocabulary\.txt",
    r"merges\.txt|bpe\.codes|dict\.txt|encoder\.json|emoji\.json|normalizer\.json|tekken\.json",
    r"[\w.-]+\.(spm|tiktoken)|(\w*tokenizer|\w*spiece|spm?|\w*sentencepiece[\w.]*)\.model(\.v\d)?",
    r"unigram\.json|entity_vocab\.json|word_(shape|pronunciation)\.json|chat_template\.(json|jinja)",
)
_KNOWN = (
    *_TOKENIZER,
    r"config\.json|generation_config\.json|params\.json",
    r"(image_|video_|)(pre|)processor_config\.json|feature_extractor_config\.json",
    # sentence-transformers.
    r"modules\.json|config_sentence_transformers\.json|sentence_[a-z]+_config\.json",
    # A run's model (`dare-agg run`): the head that travels beside the body, and its history.
    r"head\.safetensors|provenance\.json",
    r"(LICEN[CS]E|NOTICE|COPYING|USE_POLICY)([.-][\w.-]*)?",
)
_NAME = re.compile("|".join(_KNOWN), re.ASCII)
_TOKENIZER_NAME = re.compile("|".join((*_TOKENIZER, r"tokenization_\w+\.py")), re.ASCII)
_UNKNOWN = "not known to belong to a model"
_PICKLED = "pickled weights, which run code: save the model again as safetensors"
# Of no use beside the merged ones, and heavy.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf")
# Folders of a model: sentence-transformers' steps after the body, and further chat templates.
_STEP = re.compile(r"\d+_[A-Za-z]\w*", re.ASCII)
_STEP_FILE = re.compile(
    r"(\w*_)?config\.json|model\.safetensors|(wordembedding|vocab)\w*\.(json|txt)"
)
_TEMPLATES, _TEMPLATE = "additional_chat_templates", re.compile(r"[\w.-]+\.jinja", re.ASCII)
_CODE = ".py"
# Where transformers names the code that it would run.
_CODE_KEYS = ("auto_map", "custom_pipelines")
_MODULES = "modules.json"


@dataclass(frozen=True)
class Left:
    """A file (or a folder, with a slash) of a model that was not carried, and why."""

    file: str
    why: str


@dataclass(frozen=True)
class Carried:
    """Which files went along with a model, and which did not."""

    files: tuple[str, ...] = ()
    left: tuple[Left, ...] = ()


def carry_files(
    source: Path,
    target: Path,
    *,
    code: bool = False,
    own: bool = False,
    skip: Collection[str] = (),
    only: Callable[[str], bool] = lambda _: True,
) -> Carried:
    """Copy what belongs to a model from one folder into another, but for its weights.

    Nothing in ``target`` is replaced, and no file becomes readable for more people than before.
    ``code`` carries Python files and what refers to them. ``own`` is for a folder that the user
    answers for: its card, its code and files of any name go along too. ``skip`` are names that
    the caller takes care of, and so are those that ``only`` is not true of. Raises
    `CheckpointError` where ``target`` cannot be written.
    """
    files: list[str] = []
    left: list[Left] = []
    for file, why in _listed(source, code or own, own):
        if file in (INDEX_NAME, *skip) or not only(file) or (target / file).exists():
            continue
        try:
            if why:
                raise _Stays(why)
            left += _copy(source, file, target, code or own)
            files.append(file)
        except _Stays as stays:
            left.append(Left(_printable(file), str(stays)))
    return Carried(tuple(files), tuple(left))


def is_tokenizer_file(file: str) -> bool:
    """Whether a file, by its name within a model's folder, is one of the tokenizer's."""
    folder = file.partition("/")[0]
    return folder == _TEMPLATES or _TOKENIZER_NAME.fullmatch(file) is not None


def steps_of(folder: Path) -> list[str]:
    """The names of sentence-transformers' steps after the body, folders of a model's folder."""
    return sorted(p.name for p in folder.iterdir() if _STEP.fullmatch(p.name) and p.is_dir())


def may_be_carried(file: str) -> bool:
    """Whether a file, by its name within a model's folder, is known to belong to a model."""
    folder, slash, name = file.rpartition("/")
    if not slash:
        return _NAME.fullmatch(name) is not None
    pattern = _pattern_of(folder)
    return pattern is not None and pattern.fullmatch(name) is not None


def _pattern_of(folder: str) -> re.Pattern[str] | None:
    """What the files of a model's subfolder are called; None for a folder that is no model's."""
    if folder == _TEMPLATES:
        return _TEMPLATE
    return _STEP_FILE if _STEP.fullmatch(folder) else None


class _Stays(Exception):
    """Why a file is not carried."""


def _listed(source: Path, code: bool, own: bool) -> Iterator[tuple[str, str]]:
    """Every file of the folder, and why it is not to be carried ("" where it may be)."""
    for path in sorted(source.iterdir()):
        name = path.name
        if path.is_dir():
            pattern = _pattern_of(name)
            if path.is_symlink() or pattern is None:
                yield f"{name}/", _UNKNOWN
                continue
            for inner in sorted(path.iterdir()):
                known = pattern.fullmatch(inner.name)
                why = _PICKLED if inner.suffix in (".bin", ".pt", ".pth") else _UNKNOWN
                yield f"{name}/{inner.name}", "" if known else why
        elif name.endswith(_CODE):
            yield name, "" if code else "code: --carry-code takes it along"
        elif name == CARD:
            yield name, "" if own else "it describes another model"
        elif _NAME.fullmatch(name):
            yield name, ""
        elif path.suffix in _WEIGHTS or name.endswith(".index.json"):
            yield name, "weights that were not merged"
        else:
            yield name, "" if own else _UNKNOWN


def _copy(source: Path, file: str, target: Path, code: bool) -> list[Left]:
    """Copy one file; returns what was left out of it. Raises `_Stays`."""
    try:
        real = (source / file).resolve(strict=True)
        if not _belongs(real, source.resolve()):
            raise _Stays("a link that leaves the folder: copy what it names into it")
        # A pipe must not hold us, nor a link that was put there since.
        handle = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise _Stays(f"it cannot be read: {getattr(error, 'strerror', None) or error}") from error
    with os.fdopen(handle, "rb") as stream:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise _Stays("no regular file")
        if is_lfs_pointer(stream.read(len(LFS_POINTER))):
            raise _Stays("a Git LFS pointer: `git lfs pull` in the folder fetches what it names")
        stream.seek(0)
        content: bytes | None = None
        left: list[Left] = []
        if not code and file.endswith(("config.json", _MODULES)):
            content, left = _without_code(stream, file)
        place = target / file
        try:
            place.parent.mkdir(exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            with os.fdopen(os.open(place, flags, found.st_mode & 0o666 | 0o600), "wb") as out:
                if content is None:
                    shutil.copyfileobj(stream, out)
                else:
                    out.write(content)
        except OSError as error:
            raise unwritable(place, error) from error
    return left


def _belongs(real: Path, root: Path) -> bool:
    """Whether a file, all links followed, is part of the folder ``root``, its links followed too.

    Hugging Face's cache keeps a model as ``models--OWNER--NAME/blobs/DIGEST``, and each
    revision as ``models--OWNER--NAME/snapshots/COMMIT/FILE``, a link to its blob. A blob of the
    same model is part of the model. Since ``real`` has no link left in it, neither a blob
    that is itself a link nor a ``blobs`` that leads elsewhere passes.
    """
    if real.is_relative_to(root):
        return True
    model = root.parent.parent
    cached = root.parent.name == "snapshots" and model.name.startswith("models--")
    return cached and real.parent == model / "blobs"


def _without_code(stream: BinaryIO, file: str) -> tuple[bytes, list[Left]]:
    """A configuration without what names code to be run, and what that was."""
    text = stream.read(MOST_BYTES + 1)
    try:
        value = parse_json(text)
    except FormatError as error:
        raise _Stays(f"it cannot be searched for code: {str(error)[:80]}") from error
    if file == _MODULES:
        if not isinstance(value, list):
            raise _Stays("it is no list of modules")
        foreign = [m for m in value if not str(_type(m)).startswith("sentence_transformers.")]
        if foreign:
            raise _Stays(f"it names code, {str(_type(foreign[0]))[:80]!r}: --carry-code keeps it")
        return text, []
    dropped = _drop(value)
    if not dropped:
        return text, []
    written = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    why = "it names code: --carry-code keeps it"
    return written.encode(), [Left(f"{file}: {k}", why) for k in dropped]


def _type(module: Any) -> Any:
    # Without a type nothing is loaded.
    return module.get("type", "sentence_transformers.") if isinstance(module, dict) else module


def _drop(value: Any) -> list[str]:
    """Remove the keys that name code, wherever they are; returns those that were there."""
    dropped = []
    if isinstance(value, dict):
        dropped = [key for key in _CODE_KEYS if value.pop(key, None) is not None]
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            dropped += [key for key in _drop(item) if key not in dropped]
    return dropped


def _printable(file: str) -> str:
    """A name as it can stand in a terminal and in a log."""
    return file if file.isprintable() else ascii(file)[1:-1]

"""What stands where weights should: a Git LFS pointer, a web page, a download cut off.

Each is told by its first bytes, before a reader calls it a damaged safetensors file.
"""

from __future__ import annotations

import re
from pathlib import Path

# What is looked at of a file.
HEAD_BYTES = 512
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_SIZE = re.compile(rb"^size (\d{1,15})$", re.MULTILINE)
_AGAIN = "download it again"
_PAGE = re.compile(rb"(<!--.*|<\?xml.*)?<(!doctype html|html|head|error)\b", re.IGNORECASE)
# What hubs and buckets answer in place of a file, and curl without --fail saves.
_ANSWER = re.compile(rb"(entry|file|page|repository|repo|key)? ?not found|invalid (username|cred)|"
                     rb"access (to|denied)|unauthori[sz]ed|forbidden|\{\s*\"(error|message)\"",
                     re.IGNORECASE)  # fmt: skip
# Formats by their first bytes, and what to do with a file of theirs.
_PICKLED = "which runs code and is not read: save the model again with save_pretrained"
_FORMATS = (
    (b"GGUF", "a GGUF file of llama.cpp: give it that ending, by which it is known"),
    (b"PK\x03\x04", f"a zip file, as torch.save writes its pickles, {_PICKLED}"),
    (b"\x80\x02", f"a pickle, {_PICKLED}"),
    (b"\x80\x04", f"a pickle, {_PICKLED}"),
    (b"\x89HDF\r\n", "an HDF5 file of Keras: save the model again with save_pretrained"),
    (b"\x1f\x8b", "packed with gzip: unpack it"),
    (b"\x28\xb5\x2f\xfd", "packed with zstd: unpack it"),
    (b"\xfd7zXZ", "packed with xz: unpack it"),
)


def is_lfs_pointer(head: bytes) -> bool:
    """Whether a file that begins with ``head`` only says where Git LFS keeps the content."""
    return head.startswith(LFS_POINTER)


def stands_for(file: Path, total: int) -> str | None:
    """Say what a file of ``total`` bytes is in place of weights; None where nothing is seen.

    Raises `OSError` where it cannot be read.
    """
    with file.open("rb") as stream:
        head = stream.read(HEAD_BYTES)
    if not total:
        return f"is empty: {_AGAIN}"
    if is_lfs_pointer(head):
        found = _SIZE.search(head)
        size = f" of {int(found[1]) / 1e9:.3g} GB" if found else ""
        return (
            f"is a Git LFS pointer, not the file{size} that it stands for: fetch that with "
            "`git lfs pull` in the model's folder"
        )
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if _PAGE.match(text):
        return (
            "is a web page, not weights: download the file itself, on Hugging Face at /resolve/ "
            "in place of /blob/"
        )
    if total < 1 << 16 and _ANSWER.match(text):
        line = " ".join(text.decode("ascii", "replace").split())[:80]
        return f"is a server's answer, not weights ({line!r}): {_AGAIN}"
    for magic, what in _FORMATS:
        if head.startswith(magic):
            return f"is {what}"
    if not any(head):
        return f"begins with zeros: its download never came to an end; {_AGAIN}"
    return None

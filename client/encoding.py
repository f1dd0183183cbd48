"""The encoding of a text file: told, seen in its bytes, or refused with what it could be.

Bytes of an eight-bit encoding decode under a dozen others without an error and into other
words. So what is not UTF-8 or UTF-16 is not guessed: the error shows how the same bytes read
under the likely ones, and whoever knows the language names the right one.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator

from dare_agg.errors import ConfigError, did_you_mean

_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # begins as UTF-16's does
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# What files are written in elsewhere, in the order in which they are shown.
_OTHERS = (
    *("cp1252", "shift_jis", "gb18030", "euc_kr", "big5", "euc_jp"),
    *("cp1251", "cp1250", "koi8_r", "latin-1"),
)
_SHOWN = 4
_AROUND = 12  # characters shown on each side


def decode(data: bytes, what: str, encoding: str = "") -> tuple[str, list[str]]:
    """Return the text of a file's bytes, and what is to be said of it.

    With no ``encoding``: by its byte order mark, else UTF-8, else UTF-16 where every second
    byte of a half is NUL. Raises `ConfigError`, naming the line, for any other and for bytes
    that are not of the encoding that was told.
    """
    if encoding:
        return _told(data, what, encoding)
    for mark, name in _BOMS:
        if data.startswith(mark):
            return _strictly(data, what, name), []
    if b"\0" in data:
        found = _without_mark(data)
        if found is None:
            raise ConfigError(
                f"{what} holds NUL bytes, the first in line {_line(data, data.index(0))}: it is "
                "no text, or damaged, or UTF-32 without a byte order mark (then: "
                "encoding=utf-32-le); take them out with: tr -d '\\000' < FILE > NEW"
            )
        return found[0], [f"{what} was read as {found[1]}, which it does not say"]
    if b"\x1b$" in data:
        raise ConfigError(f"{what} is ISO-2022-JP, as it seems; say so: encoding=iso2022_jp")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(_not_utf8(data, what, error)) from error
    return text, _lost(text, what)


def _told(data: bytes, what: str, encoding: str) -> tuple[str, list[str]]:
    try:
        name = codecs.lookup(encoding).name
        "".encode(name)  # refuses those that are no text encodings
    except (LookupError, ValueError, TypeError) as error:
        known = ("utf-8", "utf-16", "utf-32-le", *_OTHERS)
        raise ConfigError(
            f"encoding {encoding!r} is unknown{did_you_mean(encoding, known)}"
        ) from error
    if name == "utf-8":
        name = "utf-8-sig"  # the same, without a mark
    text = _strictly(data, what, name)
    if "\0" in text:
        raise ConfigError(f"{what} has NUL characters as {encoding}; it is of another encoding")
    if not name.startswith("utf") and not data.isascii():
        try:
            data.decode("utf-8")
        except UnicodeDecodeError:
            return text, []
        return text, [f"{what} is read as {encoding}, as told; it would be UTF-8 as well"]
    return text, _lost(text, what)


def _strictly(data: bytes, what: str, name: str) -> str:
    try:
        return data.decode(name)
    except UnicodeDecodeError as error:
        at = _line(data, error.start)
        raise ConfigError(
            f"{what} is no {name}, as its first bytes or encoding say: line {at} holds bytes "
            f"that are none ({error.reason}); name the right encoding, or mend the file"
        ) from error


def _without_mark(data: bytes) -> tuple[str, str] | None:
    """The text of UTF-16 without a byte order mark, and which; None where it is none."""
    sample = data[: 1 << 16]
    odd, even = sample[1::2].count(0), sample[::2].count(0)
    for name, there, elsewhere in (("utf-16-le", odd, even), ("utf-16-be", even, odd)):
        # Line ends, commas and Latin letters have a zero half; the other half is never zero.
        if there > 0.02 * len(sample) and elsewhere == 0 and len(data) % 2 == 0:
            try:
                text = data.decode(name)
            except UnicodeDecodeError:
                continue
            # Bytes of a text with a stray NUL make characters too, but hardly a line end.
            if "\0" not in text and ("\n" in text or there > 0.2 * len(sample)):
                return text, name
    return None


def _lost(text: str, what: str) -> list[str]:
    count = text.count("�")
    return (
        [f"{what} holds {count} characters U+FFFD: they were lost when it was written"]
        if count
        else []
    )


def _not_utf8(data: bytes, what: str, error: UnicodeDecodeError) -> str:
    shown = [f"{name}: {text!r}" for name, text in _readings(data, error.start)][:_SHOWN]
    said = f"{what} is not UTF-8 (line {_line(data, error.start)}: {error.reason})"
    if not shown:
        return f"{said}, nor any encoding that is looked for; name it: encoding=…"
    return (
        f"{said}; read as {', as '.join(shown)}; name the right one, such as encoding="
        + (shown[0].partition(":")[0])
    )


def _readings(data: bytes, at: int) -> Iterator[tuple[str, str]]:
    """How the line with this byte reads under each encoding that fits the whole file."""
    begin = data.rfind(b"\n", 0, at) + 1
    end = data.find(b"\n", at)
    line = data[begin : end if end >= 0 else len(data)]
    seen = set()
    for name in _OTHERS:
        try:
            data.decode(name)
            before = len(data[begin:at].decode(name))
            text = line.decode(name).strip()
        except UnicodeDecodeError:
            continue
        text = text[max(0, before - _AROUND) : before + _AROUND]
        if text.isprintable() and text not in seen:
            seen.add(text)
            yield name, text


def _line(data: bytes, at: int) -> int:
    return data.count(b"\n", 0, at) + 1

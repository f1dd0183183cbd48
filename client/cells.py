"""What a cell of a table means: a text, a label, or nothing.

The same label is written in many ways: 1 by one program, 1.0 by another that saw an empty cell
in the column, "1" by a third. All clients must mean one class by it.
"""

from __future__ import annotations

import math
import re
import unicodedata
from typing import Any

from dare_agg.errors import ConfigError

_WHOLE = re.compile(r"([+-]?\d+)\.0*")
_TRUTH = {"true": "True", "false": "False"}
# How programs write a missing value where a text is due.
_MISSING = {"nan", "null", "<na>", "#n/a"}
# These are written for it too, and are names as well.
MAYBE_MISSING = {"na", "n/a", "none"}


def text_of(value: Any, where: str, encoding: str = "") -> str | None:
    """The text of a cell; None where it holds nothing.

    Raises `ConfigError`, naming ``where``, for what is no text: a list, an object, bytes of
    another encoding.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bytes):
        try:
            return value.decode(encoding or "utf-8")
        except (UnicodeDecodeError, LookupError) as error:
            raise ConfigError(
                f"{where} holds bytes that are no {encoding or 'UTF-8'} text; name their "
                "encoding, such as encoding=cp1252, or store text"
            ) from error
    if isinstance(value, list | dict | tuple | set):
        kind = "an object" if isinstance(value, dict) else "a list"
        raise ConfigError(f"{where} holds {kind} ({str(value)[:40]}); one text or number is needed")
    text = str(value)
    if text and any("\ud800" <= one <= "\udfff" for one in text):
        raise ConfigError(f"{where} holds half a surrogate pair, which is no text; mend the file")
    return text


def label_of(value: Any, where: str, encoding: str = "") -> str | None:
    """The name of a label; None where the cell holds none.

    1, 1.0 and "1" are one label; true, TRUE and True; a name in composed and in decomposed
    Unicode.
    """
    text = text_of(value, where, encoding)
    if text is None:
        return None
    text = unicodedata.normalize("NFC", text.strip())
    if not text or text.lower() in _MISSING:
        return None
    whole = _WHOLE.fullmatch(text)
    return whole[1] if whole else _TRUTH.get(text.lower(), text)

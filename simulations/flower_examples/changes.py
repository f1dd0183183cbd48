"""The two changed lines, made in a copy of an example: its strategy, and its client's mods."""

from __future__ import annotations

import re
from pathlib import Path

_IMPORT = re.compile(r"^from flwr\.serverapp\.strategy import (.+)$", re.MULTILINE)


def change_two_lines(package: Path, words: str = "") -> list[str]:
    """Put ``DareStrategy(words)`` and ``dare_mod`` in; returns the changed lines.

    The imports that the two lines need are not counted, nor where a class of the example's
    own stands between: its base is the changed line, ``words`` go where it is made.
    """
    changed: list[str] = []
    for path in sorted(package.rglob("*.py")):
        old = path.read_text(encoding="utf-8")
        text = re.sub(r"\bFedAvg(?=\()", "DareStrategy", old)
        text = re.sub(r"^(class \w+)\(FedAvg\)", r"\1(DareStrategy)", text, flags=re.MULTILINE)
        if text != old:
            text = _IMPORT.sub(_without_fedavg, text)
        if words:
            text = re.sub(r"^(\s+strategy = \w+\()", rf"\g<1>{words}, ", text, flags=re.MULTILINE)
        bare = re.sub(r"^app = ClientApp\(\)", "app = ClientApp(mods=[dare_mod])", text, flags=re.M)
        bare = re.sub(r"^(app = ClientApp\(\s*mods=\[)(?!dare)", r"\1dare_mod, ", bare, flags=re.M)
        if bare != text:
            imported = "from flwr.clientapp import ClientApp\n"
            text = bare.replace(imported, f"{imported}from dare_agg.flower import dare_mod\n")
        if text != old:
            path.write_text(text, encoding="utf-8")
            changed += [line.strip() for line in set(text.splitlines()) - set(old.splitlines())]
    return changed


def _without_fedavg(found: re.Match[str]) -> str:
    left = [name for name in re.split(r",\s*", found[1]) if name != "FedAvg"]
    lines = ["from dare_agg.flower import DareStrategy"]
    if left:
        lines.append(f"from flwr.serverapp.strategy import {', '.join(left)}")
    return "\n".join(lines)

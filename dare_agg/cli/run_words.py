"""The run config's keys for people at a terminal: below a run's help, and when Tab is pressed."""

from __future__ import annotations

import shutil
import textwrap

from dare_agg.errors import ConfigError
from dare_agg.files.app_config import Scalar, app_defaults, find_app, key_groups


def config_text() -> str:
    """The keys by heading with their defaults; "" where no app is around."""
    try:
        app = find_app(None)
        groups, usual = key_groups(app), app_defaults(app)
    except ConfigError:
        return ""
    width = max(50, min(shutil.get_terminal_size().columns, 100))
    lines = ["", "", "Run config of this app, -c KEY=VALUE; what each means: docs/CONFIG.md"]
    for heading, keys in groups.items():
        shown = " ".join(f"{key}={typed(usual[key])}" for key in keys)
        lines.append(f"  {heading}:")
        lines += textwrap.wrap(
            shown, width, initial_indent="    ", subsequent_indent="    ",
            break_long_words=False, break_on_hyphens=False,
        )  # fmt: skip
    return "\n".join(lines)


def typed(value: Scalar) -> str:
    """A value as it is typed after ``KEY=``.

    >>> typed(True), typed("mean"), typed(0.5)
    ('true', 'mean', '0.5')
    """
    return str(value).lower() if isinstance(value, bool) else str(value)


def complete_config(incomplete: str) -> list[str]:
    """What Tab offers behind ``-c``: the keys that begin so."""
    try:
        return [f"{key}=" for key in app_defaults(find_app(None)) if key.startswith(incomplete)]
    except ConfigError:
        return []

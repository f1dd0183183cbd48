"""Where a passphrase comes from: a file, the environment, or the person at the terminal."""

from __future__ import annotations

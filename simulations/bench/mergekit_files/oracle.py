"""mergekit in a process of its own: the float32 result of a file, and the float64 one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_DRIVER = Path(__file__).with_name("driver.py")


class Mergekit:
    """A running mergekit; ``python`` is that of an environment that has it."""

    def __init__(self, python: str, work: Path) -> None:
        self._loras = work / "loras"
        quiet = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        own = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        self._process = subprocess.Popen(
            [python, str(_DRIVER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, env=own | quiet,
        )  # fmt: skip

    def __enter__(self) -> Mergekit:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def merge(
        self,
        config: Mapping[str, Any],
        folder: Path,
        out: Path,
        *,
        dtype: str,
        to: str,
        seed: int = 1,
    ) -> str:
        """Merge a file's values, computed in ``dtype`` and written in ``to``; says "ok", or what
        mergekit said. Model names count from ``folder``."""
        assert self._process.stdin is not None and self._process.stdout is not None
        shutil.rmtree(out, ignore_errors=True)
        loras = self._loras / folder.name
        job = {
            "config": {**config, "dtype": dtype, "out_dtype": to}, "folder": str(folder),
            "out": str(out), "seed": seed, "loras": str(loras),
        }  # fmt: skip
        try:
            print(json.dumps(job), file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise SystemExit("error: mergekit's Python ended; does it have requirements.txt?")
        return str(json.loads(answer))

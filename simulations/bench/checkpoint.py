"""Memory and time of `dare-agg diff`, `inspect`, `apply` and `merge` on large checkpoints.

    python -m simulations.bench.checkpoint --gigabytes 2 --dtype bfloat16 --shards 4
    python -m simulations.bench.checkpoint --shapes llama-3-8b --shards 4 --drop-rates 0.9

Makes a base and a tuned model of so many bytes each under ``--folder`` (kept if there), runs the
commands as a user does, and `apply` once more with the wrong base, which must be refused with
nothing left behind; `merge` takes the tuned model and the update, by task arithmetic and by
TIES. Of ``--shapes`` values repeat from tensor to tensor, which is quicker and changes no memory.
``own_mib`` is the peak of the pages that belong to the command's process (``RssAnon``),
``mapped_mib`` that of the files it has mapped, which the system takes back when it needs them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from simulations.runs.checkpoints import WORDS, llama_3_8b_shapes, llama_shapes, make_checkpoints
from simulations.runs.memory import run_watched

_AFTER = ("apply", "merge", "merge, ties", "apply, wrong base")
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def shapes_of(nbytes: float, dtype: str) -> dict[str, tuple[int, ...]]:
    """A llama-like model of about so many bytes."""
    few, more = (
        sum(a * (b[0] if b else 1) for a, *b in llama_shapes(layers).values()) for layers in (1, 2)
    )
    return llama_shapes(max(1, round((nbytes / _BYTES[dtype] - few) / (more - few)) + 1))


def measure(
    base: Path, tuned: Path, folder: Path, drop_rate: str, values: str, after: Sequence[str]
) -> dict[str, Any]:
    """Peak MiB and seconds of diff, inspect and the commands after them, on one pair."""
    update, out = folder / "x.dare", folder / "out"
    dare = ("--drop-rate", drop_rate, "--values", values)
    runs = {
        "diff": ("diff", base, tuned, "-o", update, *dare),
        "inspect": ("inspect", update, "--json"),
        "apply": ("apply", base, update, "-o", out),
        "merge": ("merge", base, tuned, update, "-o", out),
        "merge, ties": ("merge", base, tuned, update, "-o", out, "--method", "ties"),
        "apply, wrong base": ("apply", tuned, update, "-o", folder / "wrong"),
    }
    row: dict[str, Any] = {"drop_rate": drop_rate, "values": values}
    for name in ("diff", "inspect", *after):
        words = runs[name]
        found = run_watched([sys.executable, "-m", "dare_agg.cli.main", *words])
        if found.status != ("wrong" in name):
            raise SystemExit(f"{name} ended with {found.status}: {found.err.strip()}")
        if name == "inspect":
            facts = json.loads(found.out)
            row |= {key: facts[key] for key in ("parameters", "survivors", "bytes")}
        shutil.rmtree(out, ignore_errors=True)  # there may be no room for two
        if name == "apply, wrong base":
            row["wrong_base"] = found.err.strip()
        row[name] = {
            "own_mib": found.own_mib,
            "mapped_mib": found.mapped_mib,
            "cpu_seconds": round(found.cpu_seconds, 1),
            "seconds": round(found.seconds, 1),
        }
    if (folder / "wrong").exists():
        raise SystemExit("a wrong base left a model behind")
    update.unlink()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m simulations.bench.checkpoint", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of each model")
    parser.add_argument("--shapes", choices=["llama-3-8b"], help="of this model, whatever its size")
    parser.add_argument("--dtype", choices=WORDS, default="bfloat16")
    parser.add_argument("--shards", type=int, default=1, help="files of each model")
    parser.add_argument("--drop-rates", default="0.9,0.999", help="by comma")
    parser.add_argument("--values", default="b1")
    parser.add_argument("--after", nargs="*", choices=_AFTER, default=_AFTER)
    parser.add_argument("--folder", type=Path, help="keep the models here")
    parser.add_argument("--json", action="store_true")
    words = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = words.folder or Path(temporary)
        shapes = (
            llama_3_8b_shapes() if words.shapes else shapes_of(1e9 * words.gigabytes, words.dtype)
        )
        base, tuned = make_checkpoints(
            folder, 1, words.dtype, shapes, shards=words.shards, repeated=bool(words.shapes)
        )
        size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
        rows = [
            measure(base, tuned, folder, rate, words.values, words.after)
            for rate in words.drop_rates.split(",")
        ]
    found = {"model_bytes": size, "dtype": words.dtype, "shards": words.shards, "rows": rows}
    if words.json:
        print(json.dumps(found))
        return
    print(f"{size / 1e9:.2f} GB a model, {words.dtype}, {words.shards} files")
    for row in rows:
        print(f"p = {row['drop_rate']}, {row['values']}: update of {row['bytes']:,} bytes")
        for name in ("diff", "inspect", *words.after):
            took = row[name]
            print(
                f"  {name:17s} {took['own_mib']:5d} MiB, mapped {took['mapped_mib']:5d} MiB, "
                f"{took['cpu_seconds']:7.1f} CPU s, {took['seconds']:7.1f} s"
            )
        print(f"  wrong base: {row.get('wrong_base', 'not asked')}")


if __name__ == "__main__":
    main()

"""Peak memory and time of `dare-agg diff`, `inspect` and `apply` on large checkpoints.

    python -m simulations.bench.checkpoint --gigabytes 2 --dtype bfloat16 --shards 4

Makes a base and a tuned model of so many bytes each under ``--folder`` (kept if there), runs the
three commands as a user does, and `apply` once more with the wrong base, which must be refused
with nothing left behind. ``peak_mib`` is the largest resident size of the command's process,
mapped pages of the models included.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from simulations.runs.checkpoints import WORDS, llama_shapes, make_checkpoints

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# A process started from a small one: what its parent holds counts into the peak of a child.
_WATCHED = (
    "import json, resource, subprocess, sys\n"
    "done = subprocess.run(sys.argv[1:], capture_output=True, text=True)\n"
    "usage = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
    "print(json.dumps([done.returncode, done.stdout, done.stderr, usage.ru_maxrss >> 10,\n"
    "                  usage.ru_utime + usage.ru_stime]))\n"
)


def shapes_of(nbytes: float, dtype: str) -> dict[str, tuple[int, ...]]:
    """A llama-like model of about so many bytes."""
    few, more = (
        sum(a * (b[0] if b else 1) for a, *b in llama_shapes(layers).values()) for layers in (1, 2)
    )
    return llama_shapes(max(1, round((nbytes / _BYTES[dtype] - few) / (more - few)) + 1))


def watched(*words: object) -> dict[str, Any]:
    """Run a command of dare-agg; its exit status, output, peak memory and CPU time."""
    command = [sys.executable, "-m", "dare_agg.cli.main", *map(str, words)]
    ran = subprocess.run(
        [sys.executable, "-c", _WATCHED, *command], check=True, capture_output=True, text=True
    )
    status, out, err, peak, seconds = json.loads(ran.stdout)
    return {
        "status": status,
        "out": out,
        "err": err,
        "peak_mib": peak,
        "cpu_seconds": round(seconds, 1),
    }


def measure(base: Path, tuned: Path, folder: Path, drop_rate: str, values: str) -> dict[str, Any]:
    """Peak MiB and CPU seconds of the commands on one pair."""
    update, out = folder / "x.dare", folder / "out"
    runs = {
        "diff": ("diff", base, tuned, "-o", update, "--drop-rate", drop_rate, "--values", values),
        "inspect": ("inspect", update, "--json"),
        "apply": ("apply", base, update, "-o", out),
        "apply, wrong base": ("apply", tuned, update, "-o", folder / "wrong"),
    }
    row: dict[str, Any] = {"drop_rate": drop_rate, "values": values}
    for name, words in runs.items():
        found = watched(*words)
        if found["status"] != ("wrong" in name):
            raise SystemExit(f"{name} ended with {found['status']}: {found['err'].strip()}")
        if name == "inspect":
            facts = json.loads(found["out"])
            row |= {key: facts[key] for key in ("parameters", "survivors", "bytes")}
        row[name] = {key: found[key] for key in ("peak_mib", "cpu_seconds")}
    if (folder / "wrong").exists():
        raise SystemExit("a wrong base left a model behind")
    row["wrong_base"] = found["err"].strip()
    update.unlink()
    shutil.rmtree(out)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m simulations.bench.checkpoint", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of each model")
    parser.add_argument("--dtype", choices=WORDS, default="bfloat16")
    parser.add_argument("--shards", type=int, default=1, help="files of each model")
    parser.add_argument("--drop-rates", default="0.9,0.999", help="by comma")
    parser.add_argument("--values", default="b1")
    parser.add_argument("--folder", type=Path, help="keep the models here")
    parser.add_argument("--json", action="store_true")
    words = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = words.folder or Path(temporary)
        shapes = shapes_of(1e9 * words.gigabytes, words.dtype)
        base, tuned = make_checkpoints(folder, 1, words.dtype, shapes, shards=words.shards)
        size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
        rows = [
            measure(base, tuned, folder, rate, words.values) for rate in words.drop_rates.split(",")
        ]
    found = {"model_bytes": size, "dtype": words.dtype, "shards": words.shards, "rows": rows}
    if words.json:
        print(json.dumps(found))
        return
    print(f"{size / 1e9:.2f} GB a model, {words.dtype}, {words.shards} files")
    for row in rows:
        print(f"p = {row['drop_rate']}, {row['values']}: update of {row['bytes']:,} bytes")
        for name in ("diff", "inspect", "apply"):
            print(f"  {name:8s} {row[name]['peak_mib']:5d} MiB {row[name]['cpu_seconds']:7.1f} s")
        print(f"  wrong base: {row['wrong_base']}")


if __name__ == "__main__":
    main()

"""Merge mergekit's files, as they are published, by mergekit 0.1.5 and by dare-agg, and compare.

    python -m venv ~/mergekit && ~/mergekit/bin/pip install -r simulations/bench/mergekit_files/requirements.txt
    python -m simulations.bench.mergekit_files ~/mergekit/bin/python

Every file of ``files/`` is merged over tiny models in float32, bfloat16 and float16. Right is
mergekit's float32 result (its stable one, where its sort takes any of equal magnitudes), written in
the dtype that the file asks for. Where methods draw at
random, the OUTs of ``--seeds`` seeds are compared: shares kept, mean squares and means. Exit
status 1 where a file differs.
"""  # noqa: E501

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from dare_agg.errors import DareError
from dare_agg.offline.merging import merge_offline
from dare_agg.offline.recipe import make_recipe
from dare_agg.offline.recipe_file import read_recipe
from simulations.bench.mergekit_files.compare import units
from simulations.bench.mergekit_files.distribution import Draws, deviations
from simulations.bench.mergekit_files.fuzz import random_config
from simulations.bench.mergekit_files.models import Size, draw_models, write_models
from simulations.bench.mergekit_files.oracle import Mergekit

FILES = Path(__file__).with_name("files")
RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")
RIGHT = ("equal", "rounding", "alike", "refused by both")
Row = dict[str, Any]


def out_dtype(config: Mapping[str, Any], models: str) -> str:
    """In which dtype a file has OUT written, over models of one dtype."""
    return str(config.get("out_dtype") or config.get("dtype") or models)


def merge_ours(file: Path, out: Path, seed: int = 0) -> str:
    """Merge a file as ``dare-agg merge FILE -o OUT --seed SEED`` does; "ok" or what it said."""
    shutil.rmtree(out, ignore_errors=True)
    try:
        merge_offline(make_recipe({**read_recipe(file).values, "seed": seed}), out)
    except DareError as error:
        return str(error)
    return "ok"


def exact_row(mergekit: Mergekit, file: Path, config: dict[str, Any], out: Path) -> Row:
    """Compare one OUT of a method that draws nothing."""
    dtype = out_dtype(config, file.parent.name)
    said = mergekit.merge(config, file.parent, out / "theirs", dtype="float32", to=dtype)
    ours = merge_ours(file, out / "ours")
    if said != "ok" and ours != "ok":
        return {"verdict": "refused by both", "said": [said, ours]}
    if said != "ok" or ours != "ok":
        return {"verdict": f"dare-agg: {ours}; mergekit: {said}"}
    apart, where = units(out / "ours", out / "theirs")
    row: Row = {"out": dtype, "units": apart, "verdict": "equal"}
    if apart > 1:
        row["verdict"] = f"differs at {where}"
    if apart > 1 and dtype == "float32":
        mergekit.merge(config, file.parent, out / "exact", dtype="float64", to="float64")
        row["ours_to_float64"], _ = units(out / "ours", out / "exact")
        row["theirs_to_float64"], _ = units(out / "theirs", out / "exact")
        if row["ours_to_float64"] <= max(1, row["theirs_to_float64"]) or apart <= 8:
            row["verdict"] = "rounding"
    return row


def random_row(
    mergekit: Mergekit, file: Path, config: dict[str, Any], out: Path, seeds: int
) -> Row:
    """Compare the OUTs of many seeds."""
    dtype, base = out_dtype(config, file.parent.name), file.parent / config["base_model"]
    ours, theirs = Draws(), Draws()
    for seed in range(1, seeds + 1):
        # In float32, so that what is kept can be told from what is rounded away.
        said = mergekit.merge(
            config, file.parent, out / "theirs", dtype="float32", to="float32", seed=seed
        )
        if said != "ok":
            return {"verdict": f"mergekit: {said}"}
        shutil.rmtree(out / "ours", ignore_errors=True)
        recipe = make_recipe({**read_recipe(file).values, "seed": seed, "dtype": "float32"})
        merge_offline(recipe, out / "ours")
        theirs.add(out / "theirs", base)
        ours.add(out / "ours", base)
    scores = deviations(ours, theirs)
    alike = 0.9 < scores["mean"] < 1.1 and scores["kept"] < 5 and scores["square"] < 5
    return {"out": dtype, "scores": scores, "verdict": "alike" if alike else "differs"}


def rows(arguments: argparse.Namespace, work: Path) -> Iterator[Row]:
    """One row a file and dtype of the models."""
    with Mergekit(arguments.python, work) as mergekit:
        for dtype in arguments.dtypes:
            folder = work / dtype
            write_models(folder, dtype, draw_models(Size()), Size())
            for name, config in configs(arguments):
                file = folder / f"{name}.yaml"
                file.write_text(yaml.safe_dump(config, sort_keys=False))
                out = work / "out" / f"{dtype}-{name}"
                out.mkdir(parents=True, exist_ok=True)
                method = config["merge_method"]
                if method in RANDOM:
                    found = random_row(mergekit, file, config, out, arguments.seeds)
                else:
                    found = exact_row(mergekit, file, config, out)
                yield {"file": name, "method": method, "models": dtype, **found}


def configs(arguments: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """The files by name: those of ``files/``, or ``--random`` ones drawn."""
    for number in range(arguments.first, arguments.first + arguments.random):
        yield f"random-{number}", random_config(np.random.default_rng(number))
    if arguments.random:
        return
    for source in sorted(FILES.glob("*.yaml")):
        if not arguments.only or source.stem in arguments.only:
            yield source.stem, yaml.safe_load(source.read_text())


def line(row: Row) -> str:
    """A row of the table, in Markdown."""
    words = [row["file"], row["method"], row["models"], row.get("out", "")]
    if "scores" in row:
        found = "; ".join(f"{name} {score:.2f}" for name, score in row["scores"].items())
    else:
        found = f"{row['units']:.3g}" if "units" in row else ""
    if "ours_to_float64" in row:
        both = row["ours_to_float64"], row["theirs_to_float64"]
        found += " ({:.3g} and {:.3g} to its float64)".format(*both)
    return f"| {' | '.join([*words, found, row['verdict']])} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m simulations.bench.mergekit_files", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("python", help="Python of an environment with mergekit")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "float16"])
    parser.add_argument("--only", nargs="+", help="names of files")
    parser.add_argument("--seeds", type=int, default=40, help="OUTs of each random method")
    parser.add_argument("--random", type=int, default=0, help="so many files drawn instead")
    parser.add_argument("--first", type=int, default=0, help="seed of the first of them")
    parser.add_argument("--work", type=Path, help="a folder to keep; else a temporary one")
    parser.add_argument("--json", action="store_true", help="print rows as lines of JSON")
    arguments = parser.parse_args()
    work = (arguments.work or Path(tempfile.mkdtemp(prefix="mergekit-files-"))).absolute()
    wrong = 0
    if not arguments.json:
        print("| file | method | models | OUT | largest difference, units of OUT | verdict |")
        print("|---|---|---|---|---|---|")
    try:
        for row in rows(arguments, work):
            print(json.dumps(row) if arguments.json else line(row), flush=True)
            wrong += row["verdict"] not in RIGHT
    finally:
        if arguments.work is None:
            shutil.rmtree(work, ignore_errors=True)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()

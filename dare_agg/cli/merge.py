"""`dare-agg merge`: many models and a base in, one model out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

# A recipe's file names end so, a model's never.
_RECIPES = (".yaml", ".yml", ".toml", ".json")


def merge(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            help="BASE, then MODEL...: .safetensors files, model folders, adapters, .dare updates; "
            "MODEL+ADAPTER for an adapter on a model of its own; or a recipe alone, ours or "
            "mergekit's.",
            metavar="BASE MODEL... | RECIPE",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="A .safetensors file or a folder.")
    ] = None,
    method: Annotated[
        str | None, typer.Option("--method", "-m", help="See `dare-agg methods`.")
    ] = None,
    scaling: Annotated[
        float | None, typer.Option("--scaling", help="Factor of the merged delta. [1]")
    ] = None,
    weights: Annotated[
        str | None, typer.Option("--weights", help="One number a model: w1,w2,…")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", help="key=value of the method; a,b,… for one value a model."),
    ] = None,
    drop_rate: Annotated[
        str | None,
        typer.Option("--drop-rate", help="Sparsify the deltas first: one rate, or p1,p2,…"),
    ] = None,
    sparsifier: Annotated[
        str | None,
        typer.Option(
            "--sparsifier",
            help="dare, drop-only, magnitude, mergekit-dare, or that with -l2 or -linf. [dare]",
        ),
    ] = None,
    mask: Annotated[
        str | None, typer.Option("--mask", help="stratified or bernoulli. [stratified]")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of the masks. [0]")] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option("--exclude", help="Regular expression: these tensors stay the base's."),
    ] = None,
    scale: Annotated[
        list[str] | None,
        typer.Option("--scale", help="REGEX=number: scaling of the tensors that match."),
    ] = None,
    statistics: Annotated[
        list[Path] | None,
        typer.Option("--statistics", help="Statistics file, one a model, in model order."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32, bfloat16 or float16. [the base's]")
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option("--recipe", help="YAML, TOML or JSON file with all of this, or mergekit's."),
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Print the recipe instead of merging.")
    ] = False,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            "--tokenizer",
            help="base, or a MODEL: whose tokenizer, chat template and end tokens OUT gets. [base]",
        ),
    ] = None,
    vocabulary: Annotated[
        str | None,
        typer.Option(
            "--vocabulary",
            help="base or union: align rows token by token; union adds the models' further tokens.",
        ),
    ] = None,
    carry_code: Annotated[
        bool, typer.Option("--carry-code", help="Copy BASE's Python files and auto_map too.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
    threads: Annotated[int, typer.Option("--threads", min=1, help="Never changes a bit.")] = 1,
    tile: Annotated[
        int | None, typer.Option("--tile", min=1, help="Elements at a time; never changes a bit.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Merge checkpoints, adapters or updates into one model."""
    from dataclasses import asdict
    from functools import partial
    from time import perf_counter, process_time

    from dare_agg.cli.output import print_json, print_left, stderr_console
    from dare_agg.errors import ConfigError
    from dare_agg.offline.merging import merge_offline
    from dare_agg.offline.model_words import base_word, model_words
    from dare_agg.offline.recipe import make_recipe
    from dare_agg.offline.recipe_file import RecipeFile, read_recipe
    from dare_agg.offline.yaml_text import write_yaml

    if recipe is None and paths and len(paths) == 1 and paths[0].suffix in _RECIPES:
        recipe, paths = paths[0], None
    read = read_recipe(recipe) if recipe else RecipeFile({})
    values = dict(read.values)
    target = values.pop("out", None)
    if paths:
        if len(paths) < 2 and "models" not in values:
            raise ConfigError("a merge needs BASE and at least one MODEL; name them in this order")
        values["base"] = base_word(paths[0])
        if len(paths) > 1:
            values["models"] = [model_words(path) for path in paths[1:]]
    if "base" not in values or "models" not in values:
        raise ConfigError("no models are named; give BASE MODEL... or a --recipe that has them")
    flags = {
        "method": method, "scaling": scaling, "drop-rate": _rates(drop_rate),
        "sparsifier": sparsifier, "mask": mask, "seed": seed, "exclude": exclude, "dtype": dtype,
        "tokenizer": tokenizer, "vocabulary": vocabulary,
    }  # fmt: skip
    values |= {key: value for key, value in flags.items() if value}
    values |= {key: value for key, value in flags.items() if value == 0 and value is not None}
    values.setdefault("method", "task-arithmetic")
    values["options"] = {**values.get("options", {}), **_options(option or [])}
    values["rules"] = [*values.get("rules", []), *_rules(scale or [])]
    if weights is not None:
        _each(values["models"], "weight", _numbers(weights, "--weights"), "--weights")
    if statistics:
        _each(values["models"], "statistics", [str(s) for s in statistics], "--statistics")
    checked = make_recipe(values)
    console = stderr_console()
    for note in read.notes:
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    if explain:
        if json_:
            print_json(checked.as_dict())
        else:
            typer.echo(write_yaml(checked.as_dict()))
        return
    if out is None and target is None:
        raise ConfigError("no output is named; give -o OUT (a .safetensors file or a folder)")
    started, cpu = perf_counter(), process_time()
    place = out or Path(str(target))
    work = partial(
        merge_offline, checked, place,
        overwrite=force, tile=tile, threads=threads, carry_code=carry_code,
    )  # fmt: skip
    if console.is_terminal and not json_:
        with console.status("checking") as status:

            def show(done: int, total: int) -> None:
                status.update(f"merging {done / total:.0%}")

            report = work(on_progress=show)
    else:
        report = work()
    spent = {
        "seconds": round(perf_counter() - started, 3),
        "cpu_seconds": round(process_time() - cpu, 3),
    }
    if json_:
        print_json(
            {**asdict(report), **spent, "recipe": checked.as_dict(), "notes": list(read.notes)}
        )
        return
    for warning in report.warnings:
        console.print(f"warning: {warning}", style="yellow", highlight=False, soft_wrap=True)
    print_left(report.left)
    typer.echo(
        f"{report.out}: {len(report.models)} models merged by {report.method}, "
        f"{report.parameters:,} parameters in {report.tensors} tensors, {spent['seconds']:.1f} s"
    )


def _rates(text: str | None) -> str | list[str] | None:
    return text.split(",") if text and "," in text else text


def _pairs(words: list[str], what: str) -> list[tuple[str, str]]:
    from dare_agg.errors import ConfigError

    found = []
    for word in words:
        key, equals, value = word.rpartition("=")
        if not equals or not key:
            raise ConfigError(f"{what} {word!r} is not of the form key=value")
        found.append((key, value))
    return found


def _numbers(text: str, what: str) -> list[float]:
    from dare_agg.errors import ConfigError

    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"{what} {text!r} is not a list of numbers such as 0.5,0.5") from error


def _options(words: list[str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for key, value in _pairs(words, "--option"):
        options[key] = value.split(",") if "," in value else value
    return options


def _rules(words: list[str]) -> list[dict[str, Any]]:
    return [
        {"match": key, "scaling": _numbers(value, "--scale")[0]}
        for key, value in _pairs(words, "--scale")
    ]


def _each(models: Any, key: str, given: list[Any], what: str) -> None:
    from dare_agg.errors import ConfigError

    if not isinstance(models, list) or len(given) != len(models):
        raise ConfigError(f"{what} has {len(given)} values; give one for each of the models")
    for number, value in enumerate(given):
        if not isinstance(models[number], dict):
            models[number] = {"path": models[number]}
        models[number][key] = value

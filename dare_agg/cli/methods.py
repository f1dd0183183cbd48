"""`dare-agg methods`: every row of the table of merge methods."""

from __future__ import annotations

from typing import Annotated

import typer


def methods(
    name: Annotated[
        str | None, typer.Argument(help="Show this method alone.", show_default=False)
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List the merge methods with options, defaults, formulas and references."""
    from dare_agg.cli.output import print_json, stdout_console
    from dare_agg.merge.methods import METHODS, find_method

    rows = [find_method(name)] if name else list(METHODS.values())
    if json_:
        print_json(
            {
                "methods": [
                    {
                        "name": row.name,
                        "formula": row.formula,
                        "reference": row.reference,
                        "default_weight": "1/n" if row.mean else "1",
                        "statistics": row.statistics,
                        "options": {
                            key: {
                                "default": option.usual
                                if option.default is None
                                else option.default,
                                "help": option.help,
                                "choices": list(option.choices),
                                "per_model": option.per_model,
                            }
                            for key, option in row.options.items()
                        },
                    }
                    for row in rows
                ]
            }
        )
        return
    console = stdout_console()
    for row in rows:
        console.print(f"[bold]{row.name}[/bold]  {row.formula}", highlight=False, soft_wrap=True)
        needs = f"; needs --statistics ({row.statistics})" if row.statistics else ""
        console.print(
            f"  weights {'1/n' if row.mean else '1'} by default{needs}",
            highlight=False,
            soft_wrap=True,
        )
        for key, option in row.options.items():
            words = f" ({' | '.join(option.choices)})" if option.choices else ""
            usual = option.usual if option.default is None else option.default
            default = "" if usual is None else f" \\[{usual}]"
            each = ", or one a model" if option.per_model else ""
            console.print(
                f"  {key}{default}: {option.help}{words}{each}", highlight=False, soft_wrap=True
            )
        console.print(f"  {row.reference}", highlight=False, soft_wrap=True, style="dim")

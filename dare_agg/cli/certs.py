"""`dare-agg certs`: the certificates and keys of a deployment."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def certs(
    host: Annotated[
        list[str] | None,
        typer.Option(help="Name or address of the SuperLink; repeat [127.0.0.1, localhost]."),
    ] = None,
    node: Annotated[
        list[str] | None, typer.Option(help="Name of a client site; repeat [node1, node2].")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder.")] = Path("certs"),
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Make a CA, server certificate and SuperNode keys."""
    from dare_agg.cli.output import print_json, stdout_console
    from dare_agg.deploy.certificates import make_deployment

    made = make_deployment(output, host or ["127.0.0.1", "localhost"], node or ["node1", "node2"])
    if json_:
        print_json(
            {
                "ca": str(made.ca),
                "server": str(made.server),
                "nodes": [str(path) for path in made.nodes],
                "identities": str(made.identities),
            }
        )
        return
    console = stdout_console()
    console.print(f"{made.server}: to the SuperLink (certificate, key, known identities)")
    for path in made.nodes:
        console.print(f"{path}: to this site, and node.pub to the SuperLink's operator")
    console.print(f"{made.ca.parent / 'ca.key'}: keep offline, it makes certificates")
    console.print("Next: docs/DEPLOY.md")

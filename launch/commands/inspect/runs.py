"""`internimage inspect runs`."""

from pathlib import Path
from typing import Annotated

import typer

from launch.commands.options import Json

EXAMPLE = "internimage inspect runs runs/h runs/h-again"


def runs(
    one: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    other: Annotated[Path, typer.Argument(metavar="OTHER", help="Another one.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder. [default: RUN/figures]")] = None,
    json: Json = False,
) -> None:
    """Two runs side by side: settings that differ, scores of both, their curves in one figure."""
    from launch.display import columns, show
    from pretrain.report.beside import beside

    written, rows = beside(one, other, output)
    typer.echo(str(written), err=True)
    if json:
        show(rows, as_json=True)
    else:
        typer.echo(columns([[str(value) for value in row.values()] for row in rows], list(rows[0])))

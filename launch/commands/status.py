"""`internimage status`: where runs stand."""

from pathlib import Path
from typing import Annotated

import typer

from launch.commands.options import Json

EXAMPLE = "internimage status runs/h"


def status(
    runs: Annotated[
        list[Path] | None, typer.Argument(metavar="[RUN]...", help="Run directories. [default: those in runs/]")
    ] = None,
    json: Json = False,
) -> None:
    """State, step, rate, forecast, restarts, slowest ranks and last events; with or without Slurm."""
    from data_pipeline.errors import UserError
    from launch.display import show
    from launch.status import describe
    from launch.status import status as look

    folders = runs or sorted(path.parent for path in Path("runs").glob("*/config.yaml"))
    if not folders:
        raise UserError("no run directory under runs/; name one, as in: internimage status /shared/runs/h")
    found = [look(folder) for folder in folders]
    if json:
        show(found, as_json=True)
    else:
        typer.echo("\n\n".join(describe(one) for one in found))

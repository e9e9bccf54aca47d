"""What the commands of `internimage launch` share."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data_pipeline.errors import UserError

if TYPE_CHECKING:
    from pretrain.configuration import RunConfig

Command = Annotated[list[str], typer.Argument(metavar="COMMAND...", help="`pretrain CONFIG ...`, or any program.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be started, and stop.")]
Logs = Annotated[Path | None, typer.Option(help="Folder for the other ranks' output. [default: RUN/logs]")]
RestartPause = Annotated[
    float, typer.Option("--restart-pause", min=0, help="Seconds before the first restart; doubled for each next.")
]


def check_command(command: list[str], world_size: int, coming: Sequence[str] = ()) -> "RunConfig | None":
    """A COMMAND that is `pretrain CONFIG ...` is checked here, before it costs a queue's wait.

    Returns its configuration; None for other programs. coming: runs that will be there when it starts.
    """
    from launch import invocation, preflight

    given = invocation.configuration_of(command)
    if given is None:
        return None
    if invocation.searches_for_a_plateau(command):
        raise UserError(
            "--validation starts its own ranks, so that no launcher can start it: set evaluation.every_steps and "
            "evaluation.data, which score a run while it trains, or run the command on one machine without `launch`"
        )
    from pretrain.configuration import load_config

    config = load_config(*given)
    preflight.check_run(config, world_size, coming)
    return config

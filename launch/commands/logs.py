"""`internimage logs`: what a rank has written."""

from typing import Annotated

import typer

from launch.commands.options import Run

EXAMPLE = "internimage logs runs/h --rank 7 --follow"


def logs(
    run: Run,
    rank: Annotated[int, typer.Option(min=0, help="Whose output.")] = 0,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="Of its end.")] = 50,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as it grows; Ctrl-C ends.")] = False,
) -> None:
    """The end of a rank's log; of rank 0, of the newest Slurm job's."""
    from launch.following import follow as grow
    from launch.following import last_lines, log_of

    path = log_of(run, rank)
    typer.echo(f"==> {path} <==", err=True)
    typer.echo(last_lines(path, lines))
    if follow:
        for text in grow(path):
            typer.echo(text, nl=False)

"""`internimage report`: a run as one page, or the stages of a chain as one."""

from pathlib import Path
from typing import Annotated

import typer

EXAMPLE = "internimage report runs/h"


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="A run directory; several: stages, first to last, on one page."),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The page. [default: RUN/report.html, or LAST/stages.html]")
    ] = None,
) -> None:
    """Write RUN/report.html: curves, throughput, samples and scores on one page; of several runs, their lineage too."""
    from pretrain.report import write_report, write_stages

    typer.echo(str(write_report(runs[0], output) if len(runs) == 1 else write_stages(runs, output)))

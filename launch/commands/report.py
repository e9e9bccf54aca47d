"""`internimage report`: a run as one page."""

import typer

from launch.commands.options import Run

EXAMPLE = "internimage report runs/h"


def report(run: Run) -> None:
    """Write RUN/report.html: curves, throughput, samples and scores on one page."""
    from pretrain.report import write_report

    typer.echo(str(write_report(run)))

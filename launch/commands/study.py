"""`internimage study`."""

from pathlib import Path
from typing import Annotated

import typer

from launch.commands.options import Overrides

EXAMPLE = "internimage study m3i --output runs/study --quick"


def study(
    name: Annotated[str, typer.Argument(help="m3i: the parts of the objective; operator: the paper's ablations.")],
    changes: Overrides = None,
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for plan, runs, scores, table and plot.")],
    quick: Annotated[bool, typer.Option("--quick", help="A quarter of the time for each arm, no fine-tuning.")] = False,
    seeds: Annotated[int, typer.Option(min=1, help="Pretraining seeds of every arm.")] = 2,
    only: Annotated[list[str] | None, typer.Option("--only", help="An arm by name; may be repeated.")] = None,
    held_out: Annotated[
        bool, typer.Option("--held-out", help="Score on the held-out sets (once, at the end), not on validation.")
    ] = False,
    shards: Annotated[Path | None, typer.Option(help="The embedded set; by default drawn into OUTPUT.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, of one thread each.")] = 2,
) -> None:
    """Train arms at equal time, score them on the same drawings, and say which differences the data can tell."""
    from pretrain.studies import study as run

    run(
        name, output, quick=quick, seeds=seeds, only=only or (), held_out=held_out, shards=shards, jobs=jobs,
        changes=changes or (),
    )  # fmt: skip

"""`internimage inspect batch`."""

from pathlib import Path
from typing import Annotated

import typer

from launch.commands.options import Json, Run

EXAMPLE = "internimage inspect batch runs/h --step 1000"


def batch(
    run: Run,
    step: Annotated[int, typer.Option(min=0, help="Global step.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where to write the pictures.")] = None,
    json: Json = False,
) -> None:
    """The samples of one global batch: shard, key, URL, caption."""
    from launch.display import show
    from pretrain.analysis.batch import inspect_batch

    show(inspect_batch(run, step, output=output), as_json=json)

"""`internimage shards`: from URL lists and folders to indexed, verified shards."""

from pathlib import Path
from typing import Annotated

import typer

from launch import exits

app = typer.Typer(
    help="Fetch, pack, index, verify and describe image-text shards.",
    epilog="Example: internimage shards pack captions.csv shards/mine",
    no_args_is_help=True,
)
Json = Annotated[bool, typer.Option("--json", help="For machines.")]
Set = Annotated[Path, typer.Argument(metavar="SET", help="Folder of a shard set.")]


@app.command(epilog="Example: internimage shards verify shards/mine")
def verify(folder: Set, json: Json = False) -> int:
    """Check every digest, header and sidecar row of a set."""
    from data_pipeline.preparation import verify as work
    from launch.display import show

    show(work(folder), as_json=json)
    return exits.DONE

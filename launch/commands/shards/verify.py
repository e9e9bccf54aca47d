"""`internimage shards verify`."""

from typing import Annotated

import typer

from data_pipeline.errors import BAD_DATA, DONE
from launch.commands.options import Json
from launch.commands.shards.options import IndexFolder, SetFolder, Workers

EXAMPLE = "internimage shards verify shards/mine --decode"


def verify(
    folder: SetFolder,
    index_folder: IndexFolder = None,
    decode: Annotated[bool, typer.Option("--decode", help="Decode every image, too.")] = False,
    workers: Workers = None,
    json: Json = False,
) -> int:
    """Check every digest and member of a set against its manifest and sidecars; 3 where something is wrong."""
    from data_pipeline import preparation
    from launch.display import show
    from launch.progress import progress

    with progress("verifying") as report:
        summary = preparation.verify(folder, index_folder=index_folder, workers=workers, decode=decode, progress=report)
    show(summary, as_json=json)
    return DONE if summary.sound else BAD_DATA

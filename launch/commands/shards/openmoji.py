"""`internimage shards openmoji`."""

from typing import Annotated

import typer

from launch.commands.options import Json
from launch.commands.shards.options import Output, RowsPerShard, Workers

EXAMPLE = "internimage shards openmoji shards/openmoji --image-size 96"


def openmoji(
    output: Output,
    image_size: Annotated[int, typer.Option(min=1, max=2048, help="Side of the drawings, pixels.")] = 96,
    rows_per_shard: RowsPerShard = 512,
    workers: Workers = None,
    json: Json = False,
) -> None:
    """Make the embedded set of named drawings, by two artists, split by concept and by artist into five sets."""
    from data_pipeline.preparation.sources.openmoji import build_openmoji
    from launch.display import show
    from launch.progress import progress

    with progress("drawing") as report:
        folders = build_openmoji(
            output, image_size=image_size, rows_per_shard=rows_per_shard, workers=workers, progress=report
        )
    show(folders, as_json=json)

"""`internimage shards publish`."""

from typing import Annotated

import typer

from launch.commands.options import Json
from launch.commands.shards.options import SetFolder

EXAMPLE = "internimage shards publish shards/clean s3://bucket/clean"


def publish(
    folder: SetFolder,
    url: Annotated[str, typer.Argument(metavar="URL", help="Where to: s3://, gs://, ..., anything fsspec knows.")],
    connections: Annotated[int, typer.Option(min=1, help="Shards at a time.")] = 8,
    json: Json = False,
) -> None:
    """Copy a set to object storage, shard by shard; what is there already is left alone."""
    from data_pipeline.curation.decisions import SetPath
    from data_pipeline.curation.publishing import publish as copy
    from launch.display import show
    from launch.progress import progress

    with progress("copying") as report:
        summary = copy(SetPath(folder), url, connections=connections, progress=report)
    show(summary, as_json=json)

"""`internimage shards index`."""

from typing import Annotated

import typer

from launch.commands.options import Json
from launch.commands.shards.options import IndexFolder, SetFolder, Workers

EXAMPLE = "internimage shards index /data/cc12m --index-folder indexes/cc12m"


def index(
    folder: SetFolder,
    index_folder: IndexFolder = None,
    force: Annotated[bool, typer.Option("--force", help="Read shards again that have a current index.")] = False,
    workers: Workers = None,
    json: Json = False,
) -> None:
    """Index foreign WebDataset shards: sidecars and a manifest."""
    from data_pipeline import preparation
    from data_pipeline.preparation import check_usable
    from launch.display import show
    from launch.progress import progress

    with progress("indexing") as report:
        summary = preparation.index(folder, index_folder=index_folder, workers=workers, force=force, progress=report)
    show(summary, as_json=json)
    check_usable(summary)

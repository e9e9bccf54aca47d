"""`internimage shards stats`."""

from pathlib import Path
from typing import Annotated

import typer

from launch.commands.options import Json
from launch.commands.shards.options import IndexFolder, SetFolder, Workers

EXAMPLE = "internimage shards stats shards/mine --json"


def stats(
    folder: SetFolder,
    page: Annotated[Path | None, typer.Option(help="Draw sizes, captions, domains, reasons on an HTML page.")] = None,
    index_folder: IndexFolder = None,
    workers: Workers = None,
    json: Json = False,
) -> None:
    """Counts, sizes, captions and labels of a set."""
    from data_pipeline import preparation
    from launch.display import show
    from launch.progress import progress

    with progress("reading sidecars") as report:
        summary = preparation.stats(folder, index_folder=index_folder, workers=workers, progress=report)
    show(summary, as_json=json)
    if page is not None:
        from data_pipeline.curation.decisions import SetPath
        from data_pipeline.curation.statistics_page import statistics_page

        statistics_page(SetPath(folder, index_folder), page)

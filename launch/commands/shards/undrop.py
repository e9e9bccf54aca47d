"""`internimage shards undrop`."""

from pathlib import Path
from typing import Annotated

import typer

from launch.commands.options import Json
from launch.commands.shards.options import IndexFolder, MemoryGb, SetFolder

EXAMPLE = "internimage shards undrop shards/web 'filter: min_side*'"


def undrop(
    folder: SetFolder,
    reasons: Annotated[
        list[str], typer.Argument(metavar="REASON...", help="Reasons that are taken back, as 'near duplicate*'; '*'.")
    ],
    index_folder: IndexFolder = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Count, change nothing.")] = False,
    memory_gb: MemoryGb = 1.0,
    json: Json = False,
) -> None:
    """Use samples again that filter or dedup have dropped. What was taken down stays out."""
    from data_pipeline.curation.decisions import SetPath
    from data_pipeline.curation.undropping import undrop as take_back
    from launch.display import show
    from launch.progress import progress

    with progress("writing sidecars") as report:
        summary = take_back(
            SetPath(Path(folder), index_folder), reasons, dry_run=dry_run, memory_gb=memory_gb, progress=report
        )
    show(summary, as_json=json)

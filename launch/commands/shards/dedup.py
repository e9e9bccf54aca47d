"""`internimage shards dedup`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from launch.commands.options import Json
from launch.commands.shards.options import MemoryGb, Workers

EXAMPLE = "internimage shards dedup shards/web shards/cc12m --against shards/validation --near"


class Keep(StrEnum):
    first = "first"
    largest = "largest"
    longest_caption = "longest_caption"


def dedup(
    folders: Annotated[list[Path], typer.Argument(metavar="SET...", help="Sets to leave copies out of.")],
    against: Annotated[
        list[Path] | None, typer.Option(help="Held-out set whose images always stay. Repeatable.")
    ] = None,
    near: Annotated[bool, typer.Option("--near", help="Also images that look the same (PDQ).")] = False,
    distance: Annotated[int, typer.Option(min=0, max=64, help="Bits of 256 in which near copies may differ.")] = 31,
    min_quality: Annotated[int, typer.Option(min=0, max=100, help="Plainer images are not compared.")] = 50,
    keep: Annotated[Keep, typer.Option(help="Which copy stays.")] = Keep.first,
    bands: Annotated[int | None, typer.Option(min=1, help="Bands to look at. [default: by the number of rows]")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Count, change nothing but hashes.")] = False,
    preview: Annotated[Path | None, typer.Option(help="Page of pairs, side by side.")] = None,
    workers: Workers = None,
    memory_gb: MemoryGb = 1.0,
    json: Json = False,
) -> None:
    """Leave out copies of images: within a set, across sets, and of held-out sets."""
    from data_pipeline.curation.decisions import SetPath
    from data_pipeline.curation.duplicates import DuplicateRules, dedup_sets
    from launch.display import show
    from launch.progress import progress

    with progress("looking for copies") as report:
        summary = dedup_sets(
            [SetPath(folder) for folder in folders],
            DuplicateRules(near=near, distance=distance, min_quality=min_quality, keep=keep.value, bands=bands),
            against=[SetPath(folder) for folder in against or ()],
            dry_run=dry_run,
            preview=preview,
            workers=workers,
            memory_gb=memory_gb,
            progress=report,
        )
    show(summary, as_json=json)

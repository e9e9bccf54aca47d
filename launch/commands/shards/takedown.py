"""`internimage shards takedown`."""

from pathlib import Path
from typing import Annotated

import typer

from launch.commands.options import Json
from launch.commands.shards.options import MemoryGb, Workers

EXAMPLE = "internimage shards takedown requests.txt shards/web shards/cc12m --erase"


def takedown(
    wanted: Annotated[
        Path, typer.Argument(metavar="LIST", help="One a line: a URL, domain:NAME, sha256:HEX or pdq:HEX.")
    ],
    folders: Annotated[list[Path], typer.Argument(metavar="SET...", help="Sets to take these out of.")],
    erase: Annotated[bool, typer.Option("--erase", help="Zero the bytes in the shards now. For good.")] = False,
    distance: Annotated[int, typer.Option(min=0, max=64, help="Bits of 256 in which a PDQ hash may differ.")] = 31,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Count, change nothing but hashes.")] = False,
    workers: Workers = None,
    memory_gb: MemoryGb = 1.0,
    json: Json = False,
) -> None:
    """Take out what a list names, and leave tombstones, so that no retry fetches it again."""
    from data_pipeline.curation.decisions import SetPath
    from data_pipeline.curation.takedown import take_down
    from launch.display import show
    from launch.progress import progress

    with progress("writing sidecars") as report:
        summary = take_down(
            [SetPath(folder) for folder in folders],
            wanted,
            erase=erase,
            distance=distance,
            dry_run=dry_run,
            workers=workers,
            memory_gb=memory_gb,
            progress=report,
        )
    show(summary, as_json=json)

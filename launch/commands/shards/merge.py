"""`internimage shards merge`."""

from pathlib import Path
from typing import Annotated

import typer

from launch.commands.options import Json
from launch.commands.shards import options

EXAMPLE = "internimage shards merge shards/all shards/web shards/cc12m --shuffle 0"


def merge(
    output: options.Output,
    folders: Annotated[list[Path], typer.Argument(metavar="SET...", help="Sets to join, in this order.")],
    samples_per_shard: options.SamplesPerShard = 1000,
    shuffle: options.Shuffle = None,
    part: options.PartOf = None,
    executor: options.Executor = options.ExecutorName.processes,
    workers: options.Workers = None,
    memory_gb: options.MemoryGb = 1.0,
    json: Json = False,
) -> None:
    """Write the used samples of several sets into one; classes are joined by name."""
    from data_pipeline.curation.decisions import SetPath
    from data_pipeline.curation.resharding import merge_sets
    from launch.display import show
    from launch.progress import progress

    with progress("writing shards") as report:
        summary = merge_sets(
            [SetPath(folder) for folder in folders],
            output,
            samples_per_shard=samples_per_shard,
            shuffle=shuffle,
            running=options.running(part, executor, workers, memory_gb, report),
        )
    show(summary, as_json=json)

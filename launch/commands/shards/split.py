"""`internimage shards split`."""

from typing import Annotated

import typer

from launch.commands.options import Json
from launch.commands.shards import options

EXAMPLE = "internimage shards split shards/web shards/halves train=0.95 validation=0.05"


def split(
    folder: options.SetFolder,
    output: options.Output,
    shares: Annotated[list[str], typer.Argument(metavar="NAME=SHARE...", help="Sets of OUTPUT and their shares.")],
    by: Annotated[str, typer.Option(help="Column whose equal values stay on one side.")] = "sha256",
    seed: Annotated[int, typer.Option(help="Another seed is another split.")] = 0,
    samples_per_shard: options.SamplesPerShard = 1000,
    index_folder: options.IndexFolder = None,
    part: options.PartOf = None,
    executor: options.Executor = options.ExecutorName.processes,
    workers: options.Workers = None,
    memory_gb: options.MemoryGb = 1.0,
    json: Json = False,
) -> None:
    """Split a set by a hash of the image or of a column, so that copies never straddle."""
    from data_pipeline.curation.decisions import SetPath
    from data_pipeline.curation.resharding import split_set
    from data_pipeline.errors import UserError
    from launch.display import show
    from launch.progress import progress

    wanted: dict[str, float] = {}
    for text in shares:
        name, _, share = text.partition("=")
        try:
            wanted[name] = float(share)
        except ValueError:
            raise UserError(f"share {text!r}: expected NAME=NUMBER, as train=0.9") from None
    with progress("writing shards") as report:
        summary = split_set(
            SetPath(folder, index_folder),
            output,
            wanted,
            by=by,
            seed=seed,
            samples_per_shard=samples_per_shard,
            running=options.running(part, executor, workers, memory_gb, report),
        )
    show(summary, as_json=json)

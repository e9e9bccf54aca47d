"""Options that several commands of `internimage shards` have."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

SetFolder = Annotated[
    Path, typer.Argument(metavar="SET", help="Folder of a shard set, or of foreign WebDataset shards.")
]
IndexFolder = Annotated[Path | None, typer.Option(help="Where the index is kept, if not beside the shards.")]
MemoryGb = Annotated[float, typer.Option(min=0.1, help="Memory for the rows; the rest goes to the set's disk.")]
SamplesPerShard = Annotated[int, typer.Option(min=1, help="Samples of a new shard.")]
Shuffle = Annotated[int | None, typer.Option(help="Seed of a shuffle of all samples. [default: keep the order]")]
PartOf = Annotated[str | None, typer.Option("--part", metavar="I/N", help="Do the I-th of N parts of the work.")]


class ExecutorName(StrEnum):
    processes = "processes"
    ray = "ray"


Executor = Annotated[ExecutorName, typer.Option(help="Where the work runs: here, or on the cluster of RAY_ADDRESS.")]
Output = Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder of the new set; a stopped run goes on there.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Processes. [default: the cores]")]
ShorterSide = Annotated[int | None, typer.Option(min=1, help="Shrink images to this shorter side, pixels.")]
MinSide = Annotated[int, typer.Option(min=1, help="Reject images with a shorter side below this.")]
Quality = Annotated[int, typer.Option(min=1, max=100, help="JPEG quality of images that are written anew.")]
RowsPerShard = Annotated[int, typer.Option(min=1, help="Input rows of one shard.")]
Column = Annotated[str | None, typer.Option(help="[default: found by name]")]
Classes = Annotated[Path | None, typer.Option(help="Text file, one category name a line, in label order.")]


def class_names(path: Path | None) -> list[str] | None:
    if path is None:
        return None
    from data_pipeline.errors import UserError

    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--classes {path}: cannot be read as text: {error}") from None


def running(part: str | None, executor: ExecutorName, workers: int | None, memory_gb: float, progress: Any) -> Any:
    """Returns where and how much of the work is done, for the commands that write sets anew."""
    from data_pipeline.curation.resharding import Running
    from data_pipeline.executors.units import Part

    return Running(None if part is None else Part.parse(part), executor.value, workers, memory_gb, progress)

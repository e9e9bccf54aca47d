"""Options that several commands of `internimage shards` have."""

from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from data_pipeline.callbacks import ProgressCallback
    from data_pipeline.curation.resharding import Running
    from data_pipeline.executors.units import Part
    from data_pipeline.preparation import TableFormat
    from data_pipeline.preparation.packing.away import Away

SetFolder = Annotated[
    Path, typer.Argument(metavar="SET", help="Folder of a shard set, or of foreign WebDataset shards.")
]
IndexFolder = Annotated[Path | None, typer.Option(help="Where the index is kept, if not beside the shards.")]
MemoryGb = Annotated[float, typer.Option(min=0.1, help="Memory for the rows; the rest goes to the set's disk.")]
SamplesPerShard = Annotated[int, typer.Option(min=1, help="Samples of a new shard.")]
Shuffle = Annotated[int | None, typer.Option(help="Seed of a shuffle of all samples. [default: keep the order]")]
PartOf = Annotated[str | None, typer.Option("--part", metavar="I/N", help="Do the I-th of N parts of the work.")]

Parts = Annotated[
    int | None,
    typer.Option(metavar="N", help="Cut the work into N parts, and do those that no other such task works on."),
]


TarsTo = Annotated[
    str | None,
    typer.Option(
        metavar="URL", help="Object storage that takes each shard's tar when it is whole; OUTPUT keeps the rest."
    ),
]


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
Column = Annotated[
    str | None, typer.Option(help="Its name; `none` for no such column. By default the usual names are looked for.")
]
MaxPixels = Annotated[int, typer.Option(min=1, help="Refuse images with more pixels, before they are decoded.")]
Retry = Annotated[
    list[str] | None, typer.Option(help="Make rows of finished shards anew that failed so, as http_5*. Repeatable.")
]
LeastPacked = Annotated[
    float, typer.Option(min=0, max=1, help="Exit 3 where a smaller share of the rows is packed; none at all always is.")
]
# How a table is read.
ColumnNames = Annotated[
    str | None, typer.Option("--columns", help="Columns of a file without a header, in order, as url,caption; _ skips.")
]
Preset = Annotated[str | None, typer.Option(help="A list without a header by name: cc3m, cc12m, yfcc100m.")]
Delimiter = Annotated[str | None, typer.Option(help="Between cells; tab for a tab. [default: by name and first line]")]
Encoding = Annotated[str | None, typer.Option(help="Of a text table. [default: UTF-8, UTF-16 by its mark]")]
Quoting = Annotated[str | None, typer.Option(help="csv, backslash or none. [default: a TSV has none, a CSV csv]")]
MaxCaption = Annotated[int, typer.Option(min=1, help="Reject rows whose caption has more characters.")]
Keep = Annotated[
    str | None, typer.Option(help="Further columns for the sidecar, as NSFW,similarity; none. [default: all]")
]


class Captionless(StrEnum):
    keep = "keep"
    reject = "reject"
    empty = "empty"


class Captions(StrEnum):
    first = "first"
    joined = "join"
    random = "random"


class ImageFormat(StrEnum):
    keep = "keep"
    jpg = "jpg"
    png = "png"
    webp = "webp"


Pdq = Annotated[bool, typer.Option("--pdq", help="Hash images for `dedup --near` now, while their pixels are there.")]
CaptionChoice = Annotated[Captions, typer.Option(help="Of several captions in a cell: the first, all, or one by row.")]
CaptionlessRows = Annotated[Captionless, typer.Option(help="Rows without caption: packed, rejected, or an empty .txt.")]
Format = Annotated[ImageFormat, typer.Option(help="Image format of the set; keep leaves JPEG, PNG and WebP.")]
Classes = Annotated[Path | None, typer.Option(help="Text file, one category name a line, in label order.")]


def class_names(path: Path | None) -> list[str] | None:
    if path is None:
        return None
    from data_pipeline.errors import UserError

    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--classes {path}: cannot be read as text: {error}") from None


def parsed_part(text: str | None) -> "Part | None":
    from data_pipeline.executors.units import Part

    return None if text is None else Part.parse(text)


def sent_away(tars_to: str | None) -> "Away | None":
    from data_pipeline.preparation.packing.away import Away

    return None if tars_to is None else Away(tars_to)


def complete(output: Path, tars_to: str | None) -> None:
    """Makes a finished set whole on object storage: what the shards lack, and the manifest, last."""
    if tars_to is not None:
        from data_pipeline.curation.decisions import SetPath
        from data_pipeline.curation.publishing import publish

        publish(SetPath(output), tars_to)


def check_executor(executor: ExecutorName, parts: int | None) -> None:
    """Raises UserError where a cluster has no parts to work on."""
    from data_pipeline.errors import UserError

    if executor is ExecutorName.ray and parts is None:
        raise UserError(
            "--executor ray: give --parts N, a few times the cores of the cluster; each takes a part at a time"
        )


def check_parts(part: str | None, parts: int | None, retry: Sequence[str] | None, least_packed: float) -> None:
    """Raises UserError for what has no effect on a set that is made in parts."""
    from data_pipeline.errors import UserError

    if part is not None and parts is not None:
        raise UserError("--part, --parts: give one; --parts N takes each part that no other task works on")
    if parts is not None and retry:
        raise UserError(
            "--retry: parts that are done are not made again; finish the set, then retry without --parts (and without "
            "--tasks)"
        )
    if part is not None and least_packed:
        raise UserError("--least-packed: one part is no set yet; give it to internimage shards finish")


def part_run(run: Callable[..., object], executor: ExecutorName) -> Callable[..., object]:
    """Returns what makes a part; on a cluster by one core, and without this terminal."""
    from functools import partial

    return run if executor is ExecutorName.processes else partial(run, workers=1, progress=None, notice=None)


def running(
    part: str | None, executor: ExecutorName, workers: int | None, memory_gb: float, progress: "ProgressCallback"
) -> "Running":
    """Returns where and how much of the work is done, for the commands that write sets anew."""
    from data_pipeline.curation.resharding import Running

    return Running(parsed_part(part), executor.value, workers, memory_gb, progress)


def table_format(
    names: str | None,
    preset: str | None,
    delimiter: str | None,
    encoding: str | None,
    quoting: str | None,
    captions: Captions,
    max_caption: int,
    keep: str | None,
) -> "TableFormat":
    """Makes a table's format of the options; raises UserError for what none can have."""
    from data_pipeline.preparation import TableFormat

    return TableFormat(
        delimiter={"tab": "\t", "\\t": "\t"}.get(delimiter or "", delimiter),
        encoding=encoding,
        quoting=quoting,
        names=None if names is None else tuple(name.strip() for name in names.split(",")),
        preset=preset,
        captions=captions.value,
        max_caption=max_caption,
        keep=None if keep is None else tuple(name.strip() for name in keep.split(",") if name.strip() != "none"),
    )


def say(line: str) -> None:
    """Prints a line for people where results for machines do not go."""
    typer.echo(line, err=True)

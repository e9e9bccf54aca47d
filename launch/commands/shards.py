"""`internimage shards`: from URL lists, folders and tables to indexed, verified shards."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from data_pipeline.errors import BAD_DATA, DONE

app = typer.Typer(
    help="Fetch, pack, index, verify and describe image-text shards.",
    epilog="Example: internimage shards pack captions.csv shards/mine",
    no_args_is_help=True,
)
Json = Annotated[bool, typer.Option("--json", help="For machines.")]
Set = Annotated[Path, typer.Argument(metavar="SET", help="Folder of a shard set, or of foreign WebDataset shards.")]
IndexFolder = Annotated[Path | None, typer.Option(help="Where the index is kept, if not beside the shards.")]
Output = Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder of the new set; a stopped run goes on there.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Processes. [default: the cores]")]
ShorterSide = Annotated[int | None, typer.Option(min=1, help="Shrink images to this shorter side, pixels.")]
MinSide = Annotated[int, typer.Option(min=1, help="Reject images with a shorter side below this.")]
Quality = Annotated[int, typer.Option(min=1, max=100, help="JPEG quality of images that are written anew.")]
RowsPerShard = Annotated[int, typer.Option(min=1, help="Input rows of one shard.")]


class FolderLabels(StrEnum):
    auto = "auto"
    folders = "folders"
    none = "none"


@app.command(epilog="Example: internimage shards pack captions.csv shards/mine --shorter-side 512")
def pack(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Folder of images, or a CSV, TSV or Parquet table.")],
    output: Output,
    image_column: Annotated[str | None, typer.Option(help="[default: found by name]")] = None,
    caption_column: Annotated[str | None, typer.Option(help="[default: found by name]")] = None,
    label_column: Annotated[str | None, typer.Option(help="[default: found by name]")] = None,
    url_column: Annotated[str | None, typer.Option(help="[default: found by name]")] = None,
    root: Annotated[Path | None, typer.Option(help="What relative image paths are relative to.")] = None,
    labels: Annotated[FolderLabels, typer.Option(help="Whether sub-folders are classes.")] = FolderLabels.auto,
    classes: Annotated[Path | None, typer.Option(help="Text file, one category name a line, in label order.")] = None,
    shorter_side: ShorterSide = None,
    min_side: MinSide = 1,
    quality: Quality = 95,
    rows_per_shard: RowsPerShard = 1000,
    workers: Workers = None,
    json: Json = False,
) -> int:
    """Pack local images and captions (folder, CSV, TSV, Parquet) into shards."""
    from data_pipeline.preparation import Columns, ImageRules
    from data_pipeline.preparation import pack as work
    from launch.progress import progress

    with progress("packing") as report:
        summary = work(
            source,
            output,
            columns=Columns(image=image_column, caption=caption_column, label=label_column, url=url_column),
            root=root,
            labels=labels.value,
            classes=_names(classes),
            rules=ImageRules(shorter_side=shorter_side, min_side=min_side, quality=quality),
            rows_per_shard=rows_per_shard,
            workers=workers,
            progress=report,
        )
    return _show(summary, json)


@app.command(epilog="Example: internimage shards fetch urls.parquet shards/web --shorter-side 512 --retry timeout")
def fetch(
    table: Annotated[Path, typer.Argument(metavar="TABLE", help="CSV, TSV, Parquet, or text with one URL a line.")],
    output: Output,
    url_column: Annotated[str | None, typer.Option(help="[default: found by name]")] = None,
    caption_column: Annotated[str | None, typer.Option(help="[default: found by name]")] = None,
    label_column: Annotated[str | None, typer.Option(help="[default: found by name]")] = None,
    classes: Annotated[Path | None, typer.Option(help="Text file, one category name a line, in label order.")] = None,
    shorter_side: ShorterSide = None,
    min_side: MinSide = 1,
    quality: Quality = 95,
    rows_per_shard: RowsPerShard = 1000,
    connections: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 64,
    per_host: Annotated[int, typer.Option(min=1, help="Requests at a time to one host.")] = 4,
    deadline: Annotated[float, typer.Option(min=0.1, help="Seconds that one attempt may take.")] = 30.0,
    attempts: Annotated[int, typer.Option(min=1, help="Tries of one URL.")] = 3,
    user_agent: Annotated[str | None, typer.Option(help="Who fetches, and how to reach them.")] = None,
    private_network: Annotated[
        list[str] | None, typer.Option(help="Network (CIDR) that may be asked though it is not public. Repeatable.")
    ] = None,
    retry: Annotated[
        list[str] | None, typer.Option(help="Ask again for finished rows with this reason, as http_5*. Repeatable.")
    ] = None,
    workers: Workers = None,
    json: Json = False,
) -> int:
    """Fetch a URL list into shards, politely and resumably, with a status for every row."""
    from data_pipeline.preparation import Columns, ImageRules, WebRules
    from data_pipeline.preparation import fetch as work
    from launch.progress import progress

    web = WebRules(
        connections=connections,
        per_host=per_host,
        deadline=deadline,
        attempts=attempts,
        private_networks=tuple(private_network or ()),
        user_agent=user_agent or WebRules.user_agent,
    )
    with progress("fetching") as report:
        summary = work(
            table,
            output,
            columns=Columns(url=url_column, caption=caption_column, label=label_column),
            classes=_names(classes),
            rules=ImageRules(shorter_side=shorter_side, min_side=min_side, quality=quality),
            web=web,
            retry=tuple(retry or ()),
            rows_per_shard=rows_per_shard,
            workers=workers,
            progress=report,
        )
    return _show(summary, json)


@app.command(epilog="Example: internimage shards index /data/cc12m --index-folder indexes/cc12m")
def index(
    folder: Set,
    index_folder: IndexFolder = None,
    force: Annotated[bool, typer.Option("--force", help="Read shards again that have a current index.")] = False,
    json: Json = False,
) -> int:
    """Index foreign WebDataset shards: sidecars and a manifest."""
    from data_pipeline.preparation import index as work
    from launch.progress import progress

    with progress("indexing") as report:
        summary = work(folder, index_folder=index_folder, force=force, progress=report)
    return _show(summary, json)


@app.command(epilog="Example: internimage shards verify shards/mine --decode")
def verify(
    folder: Set,
    index_folder: IndexFolder = None,
    decode: Annotated[bool, typer.Option("--decode", help="Decode every image, too.")] = False,
    json: Json = False,
) -> int:
    """Check every digest and member of a set against its manifest and sidecars; 3 where something is wrong."""
    from data_pipeline.preparation import verify as work
    from launch.progress import progress

    with progress("verifying") as report:
        summary = work(folder, index_folder=index_folder, decode=decode, progress=report)
    _show(summary, json)
    return DONE if summary.sound else BAD_DATA


@app.command(epilog="Example: internimage shards stats shards/mine --json")
def stats(folder: Set, index_folder: IndexFolder = None, json: Json = False) -> int:
    """Counts, sizes, captions and labels of a set."""
    from data_pipeline.preparation import stats as work
    from launch.progress import progress

    with progress("reading sidecars") as report:
        summary = work(folder, index_folder=index_folder, progress=report)
    return _show(summary, json)


@app.command(epilog="Example: internimage shards openmoji shards/openmoji --image-size 96")
def openmoji(
    output: Output,
    image_size: Annotated[int, typer.Option(min=1, max=2048, help="Side of the drawings, pixels.")] = 96,
    rows_per_shard: RowsPerShard = 512,
    workers: Workers = None,
    json: Json = False,
) -> int:
    """Make the embedded set of named drawings, split by concept into three sets."""
    from data_pipeline.preparation.sources.openmoji import build_openmoji
    from launch.progress import progress

    with progress("drawing") as report:
        folders = build_openmoji(
            output, image_size=image_size, rows_per_shard=rows_per_shard, workers=workers, progress=report
        )
    return _show(folders, json)


def _names(path: Path | None) -> list[str] | None:
    if path is None:
        return None
    from data_pipeline.errors import UserError

    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--classes {path}: cannot be read as text: {error}") from None


def _show(result: Any, json: bool) -> int:
    from launch.display import show

    show(result, as_json=json)
    return DONE

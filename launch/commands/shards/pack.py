"""`internimage shards pack`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from launch.commands.options import Json
from launch.commands.shards import options

EXAMPLE = "internimage shards pack captions.csv shards/mine --shorter-side 512"


class LabelSource(StrEnum):
    auto = "auto"
    folders = "folders"
    none = "none"


def pack(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Folder of images, or a CSV, TSV or Parquet table.")],
    output: options.Output,
    image_column: options.Column = None,
    caption_column: options.Column = None,
    label_column: options.Column = None,
    url_column: options.Column = None,
    root: Annotated[Path | None, typer.Option(help="What relative image paths are relative to.")] = None,
    labels: Annotated[LabelSource, typer.Option(help="Whether sub-folders are classes.")] = LabelSource.auto,
    classes: options.Classes = None,
    shorter_side: options.ShorterSide = None,
    min_side: options.MinSide = 1,
    quality: options.Quality = 95,
    rows_per_shard: options.RowsPerShard = 1000,
    workers: options.Workers = None,
    json: Json = False,
) -> None:
    """Pack local images and captions (folder, CSV, TSV, Parquet) into shards."""
    from data_pipeline import preparation
    from data_pipeline.preparation import Columns, ImageRules
    from launch.display import show
    from launch.progress import progress

    with progress("packing") as report:
        summary = preparation.pack(
            source,
            output,
            columns=Columns(image=image_column, caption=caption_column, label=label_column, url=url_column),
            root=root,
            labels=labels.value,
            classes=options.class_names(classes),
            rules=ImageRules(shorter_side=shorter_side, min_side=min_side, quality=quality),
            rows_per_shard=rows_per_shard,
            workers=workers,
            progress=report,
        )
    show(summary, as_json=json)

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
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="Folder of images; or a CSV, TSV, JSONL or Parquet table or URL."),
    ],
    output: options.Output,
    image_column: options.Column = None,
    caption_column: options.Column = None,
    label_column: options.Column = None,
    url_column: options.Column = None,
    hash_column: options.Column = None,
    columns: options.ColumnNames = None,
    preset: options.Preset = None,
    delimiter: options.Delimiter = None,
    encoding: options.Encoding = None,
    quoting: options.Quoting = None,
    captions: options.CaptionChoice = options.Captions.first,
    max_caption: options.MaxCaption = 32_768,
    keep: options.Keep = None,
    captionless: options.CaptionlessRows = options.Captionless.keep,
    root: Annotated[Path | None, typer.Option(help="What relative image paths are relative to.")] = None,
    labels: Annotated[LabelSource, typer.Option(help="Whether sub-folders are classes.")] = LabelSource.auto,
    classes: options.Classes = None,
    shorter_side: options.ShorterSide = None,
    min_side: options.MinSide = 1,
    max_pixels: options.MaxPixels = 89_478_485,
    max_bytes: Annotated[int, typer.Option(min=1, help="Refuse files with more bytes; no more is read.")] = 100_000_000,
    quality: options.Quality = 95,
    image_format: options.Format = options.ImageFormat.keep,
    retry: options.Retry = None,
    least_packed: options.LeastPacked = 0.0,
    rows_per_shard: options.RowsPerShard = 1000,
    workers: options.Workers = None,
    json: Json = False,
) -> None:
    """Pack local images and captions (folder, CSV, TSV, JSONL, Parquet) into shards."""
    from data_pipeline import preparation
    from data_pipeline.preparation import Columns, ImageRules, check_usable
    from launch.display import show
    from launch.progress import progress

    with progress("packing") as report:
        summary = preparation.pack(
            source,
            output,
            columns=Columns(image_column, caption_column, label_column, url_column, hash_column),
            format=options.table_format(columns, preset, delimiter, encoding, quoting, captions, max_caption, keep),
            root=root,
            labels=labels.value,
            classes=options.class_names(classes),
            rules=ImageRules(shorter_side, min_side, max_pixels, max_bytes, quality, image_format.value),
            captionless=captionless.value,
            retry=tuple(retry or ()),
            rows_per_shard=rows_per_shard,
            workers=workers,
            progress=report,
            notice=options.say,
        )
    show(summary, as_json=json)
    check_usable(summary, least_packed)

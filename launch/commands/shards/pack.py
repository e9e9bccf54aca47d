"""`internimage shards pack`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from launch.commands.options import Json, refuse_other_options
from launch.commands.shards import options

EXAMPLE = "internimage shards pack captions.csv shards/mine --shorter-side 512"


class LabelSource(StrEnum):
    auto = "auto"
    folders = "folders"
    none = "none"


Annotations = Annotated[Path | None, typer.Option(help="COCO's instances JSON, of pictures under SOURCE.")]
LabelMaps = Annotated[Path | None, typer.Option(help="Folder of PNG label maps, by the paths under SOURCE.")]


_OF_ANNOTATIONS = (  # parameters that sets with annotations have, too
    "source", "output", "shorter_side", "min_side", "max_pixels", "max_bytes", "quality", "image_format", "pdq",
    "least_packed", "rows_per_shard", "workers", "json",
)  # fmt: skip
_OF_LABEL_MAPS = (*_OF_ANNOTATIONS, "label_maps", "classes", "reduce_zero_label")


def pack(
    context: typer.Context,
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
    coco: Annotations = None,
    label_maps: LabelMaps = None,
    reduce_zero_label: Annotated[bool, typer.Option(help="With --label-maps: 0 is no class, 1 the first.")] = False,
    image_format: options.Format = options.ImageFormat.keep,
    pdq: options.Pdq = False,
    retry: options.Retry = None,
    shuffle: Annotated[int | None, typer.Option(help="Place rows in an order drawn from this number.")] = None,
    least_packed: options.LeastPacked = 0.0,
    rows_per_shard: options.RowsPerShard = 1000,
    part: options.PartOf = None,
    parts: options.Parts = None,
    tars_to: options.TarsTo = None,
    executor: options.Executor = options.ExecutorName.processes,
    workers: options.Workers = None,
    json: Json = False,
) -> None:
    """Pack images with captions (folder, CSV, TSV, JSONL, Parquet), COCO's objects or label maps into shards."""
    from functools import partial

    from data_pipeline import preparation
    from data_pipeline.errors import UserError
    from data_pipeline.preparation import Columns, ImageRules, PackSummary, check_usable
    from data_pipeline.preparation.packing.parts import in_parts
    from launch.commands.shards.finish import tell
    from launch.display import show
    from launch.progress import progress

    options.check_executor(executor, parts)
    options.check_parts(part, parts, retry, least_packed)
    if coco is not None and label_maps is not None:
        raise UserError("--coco and --label-maps: a set has one of them; pack two sets")
    if coco is not None:
        refuse_other_options(context, (*_OF_ANNOTATIONS, "coco"), "--coco")
    elif label_maps is not None:
        refuse_other_options(context, _OF_LABEL_MAPS, "--label-maps")
    elif reduce_zero_label:
        raise UserError("--reduce-zero-label: no effect without --label-maps; leave it out")
    given = Columns(image_column, caption_column, label_column, url_column, hash_column)
    rules = ImageRules(shorter_side, min_side, max_pixels, max_bytes, quality, image_format.value, pdq)
    names = options.class_names(classes)
    summary: PackSummary
    with progress("packing") as report:
        if coco is not None:
            summary = preparation.pack_coco(
                Path(source), output, coco, rules=rules, rows_per_shard=rows_per_shard, workers=workers, progress=report
            )
        elif label_maps is not None:
            summary = preparation.pack_label_maps(
                Path(source),
                output,
                label_maps,
                classes=names or (),
                reduce_zero_label=reduce_zero_label,
                rules=rules,
                rows_per_shard=rows_per_shard,
                workers=workers,
                progress=report,
            )
        else:
            run = partial(
                preparation.pack,
                source,
                output,
                columns=given,
                format=options.table_format(columns, preset, delimiter, encoding, quoting, captions, max_caption, keep),
                root=root,
                labels=labels.value,
                classes=names,
                rules=rules,
                captionless=captionless.value,
                retry=tuple(retry or ()),
                shuffle=shuffle,
                rows_per_shard=rows_per_shard,
                away=options.sent_away(tars_to),
                workers=workers,
                progress=report,
                notice=options.say,
            )
            if parts is not None:
                done = in_parts(output, parts, options.part_run(run, executor), executor=executor.value)
                if done is not None:
                    options.complete(output, tars_to)
                tell(done, output, json)
                if done is not None:
                    check_usable(done, least_packed)
                return
            summary = run(part=options.parsed_part(part))
    show(summary, as_json=json)
    if part is None:
        options.complete(output, tars_to)
        check_usable(summary, least_packed)

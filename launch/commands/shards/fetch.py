"""`internimage shards fetch`."""

from typing import Annotated

import typer

from launch.commands.options import Json
from launch.commands.shards import options

EXAMPLE = "internimage shards fetch urls.parquet shards/web --shorter-side 512 --retry timeout"


def fetch(
    table: Annotated[
        str, typer.Argument(metavar="TABLE", help="CSV, TSV, JSONL, Parquet, or text with one URL a line; or its URL.")
    ],
    output: options.Output,
    url_column: options.Column = None,
    caption_column: options.Column = None,
    label_column: options.Column = None,
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
    classes: options.Classes = None,
    shorter_side: options.ShorterSide = None,
    min_side: options.MinSide = 1,
    max_pixels: options.MaxPixels = 89_478_485,
    quality: options.Quality = 95,
    image_format: options.Format = options.ImageFormat.keep,
    pdq: options.Pdq = False,
    rows_per_shard: options.RowsPerShard = 1000,
    connections: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 64,
    per_host: Annotated[int, typer.Option(min=1, help="Requests at a time to one host.")] = 4,
    deadline: Annotated[float, typer.Option(min=0.1, help="Seconds that one attempt may take.")] = 30.0,
    attempts: Annotated[int, typer.Option(min=1, help="Tries of one URL.")] = 3,
    user_agent: Annotated[str | None, typer.Option(help="Who fetches, and how to reach them.")] = None,
    private_network: Annotated[
        list[str] | None, typer.Option(help="Network (CIDR) that may be asked though it is not public. Repeatable.")
    ] = None,
    nameserver: Annotated[
        list[str] | None, typer.Option(help="Name server (address, :port) in place of the system's. Repeatable.")
    ] = None,
    mix: Annotated[
        int | None, typer.Option(help="Fetch shards in an order drawn from this number: hosts of a sorted list mix.")
    ] = None,
    retry: options.Retry = None,
    least_packed: options.LeastPacked = 0.0,
    part: options.PartOf = None,
    parts: options.Parts = None,
    tars_to: options.TarsTo = None,
    executor: options.Executor = options.ExecutorName.processes,
    workers: options.Workers = None,
    json: Json = False,
) -> None:
    """Fetch a URL list into shards, politely and resumably, with a status for every row."""
    from functools import partial

    from data_pipeline import preparation
    from data_pipeline.preparation import Columns, ImageRules, WebRules, check_usable
    from data_pipeline.preparation.packing.parts import in_parts
    from launch.commands.shards.finish import tell
    from launch.display import show
    from launch.progress import progress

    options.check_executor(executor, parts)
    options.check_parts(part, parts, retry, least_packed)
    web = WebRules(
        connections=connections,
        per_host=per_host,
        deadline=deadline,
        attempts=attempts,
        private_networks=tuple(private_network or ()),
        nameservers=tuple(nameserver or ()),
        user_agent=user_agent or WebRules.user_agent,
    )
    with progress("fetching") as report:
        run = partial(
            preparation.fetch,
            table,
            output,
            columns=Columns(None, caption_column, label_column, url_column, hash_column),
            format=options.table_format(columns, preset, delimiter, encoding, quoting, captions, max_caption, keep),
            classes=options.class_names(classes),
            rules=ImageRules(shorter_side, min_side, max_pixels, quality=quality, format=image_format.value, pdq=pdq),
            captionless=captionless.value,
            web=web,
            mix=mix,
            retry=tuple(retry or ()),
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

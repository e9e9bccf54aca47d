"""`internimage shards fetch`."""

from pathlib import Path
from typing import Annotated

import typer

from launch.commands.options import Json
from launch.commands.shards import options

EXAMPLE = "internimage shards fetch urls.parquet shards/web --shorter-side 512 --retry timeout"


def fetch(
    table: Annotated[Path, typer.Argument(metavar="TABLE", help="CSV, TSV, Parquet, or text with one URL a line.")],
    output: options.Output,
    url_column: options.Column = None,
    caption_column: options.Column = None,
    label_column: options.Column = None,
    classes: options.Classes = None,
    shorter_side: options.ShorterSide = None,
    min_side: options.MinSide = 1,
    quality: options.Quality = 95,
    rows_per_shard: options.RowsPerShard = 1000,
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
    workers: options.Workers = None,
    json: Json = False,
) -> None:
    """Fetch a URL list into shards, politely and resumably, with a status for every row."""
    from data_pipeline import preparation
    from data_pipeline.preparation import Columns, ImageRules, WebRules
    from launch.display import show
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
        summary = preparation.fetch(
            table,
            output,
            columns=Columns(url=url_column, caption=caption_column, label=label_column),
            classes=options.class_names(classes),
            rules=ImageRules(shorter_side=shorter_side, min_side=min_side, quality=quality),
            web=web,
            retry=tuple(retry or ()),
            rows_per_shard=rows_per_shard,
            workers=workers,
            progress=report,
        )
    show(summary, as_json=json)

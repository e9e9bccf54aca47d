"""`internimage shards filter`."""

from pathlib import Path
from typing import Annotated

import typer

from launch.commands.options import Json
from launch.commands.shards.options import IndexFolder, MemoryGb, SetFolder

EXAMPLE = "internimage shards filter shards/web --where 'try_cast(similarity as double) >= 0.28' --dry-run"


def filter_(
    folder: SetFolder,
    min_side: Annotated[int | None, typer.Option(min=1, help="Shorter side, pixels.")] = None,
    max_aspect: Annotated[float | None, typer.Option(min=1, help="Longer side by shorter side.")] = None,
    min_characters: Annotated[int | None, typer.Option(min=1, help="Of the caption.")] = None,
    max_characters: Annotated[int | None, typer.Option(min=1, help="Of the caption.")] = None,
    min_words: Annotated[int | None, typer.Option(min=1, help="Of the caption.")] = None,
    script: Annotated[
        list[str] | None, typer.Option(help="Captions in this script alone: ascii, latin, han, ... Repeatable.")
    ] = None,
    min_similarity: Annotated[float | None, typer.Option(help="Column similarity.")] = None,
    nsfw: Annotated[list[str] | None, typer.Option(help="Allowed value of the column nsfw. Repeatable.")] = None,
    licence: Annotated[list[str] | None, typer.Option(help="Allowed value of the column licence. Repeatable.")] = None,
    without_domain: Annotated[list[str] | None, typer.Option(help="With its sub-domains. Repeatable.")] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(help="Condition over columns, in SQL; == compares. As NAME='blur < 3'. Repeatable."),
    ] = None,
    keep_unknown: Annotated[
        bool, typer.Option("--keep-unknown", help="Keep rows that lack what a rule looks at.")
    ] = False,
    scores: Annotated[Path | None, typer.Option(help="Parquet file of further columns, by key, sha256 or url.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the waterfall, change nothing.")] = False,
    preview: Annotated[
        Path | None, typer.Option(help="Page of pictures that stay and go. [default with --dry-run: SET-filter.html]")
    ] = None,
    memory_gb: MemoryGb = 1.0,
    index_folder: IndexFolder = None,
    json: Json = False,
) -> None:
    """Leave out the rows that rules refuse; the first rule that does is the row's reason."""
    from data_pipeline.curation.filters import FilterRules, filter_set
    from launch.display import show
    from launch.progress import progress

    rules = FilterRules(
        min_side=min_side,
        max_aspect=max_aspect,
        min_characters=min_characters,
        max_characters=max_characters,
        min_words=min_words,
        scripts=tuple(script or ()),
        min_similarity=min_similarity,
        nsfw=tuple(nsfw or ()),
        licences=tuple(licence or ()),
        domains=tuple(without_domain or ()),
        expressions=tuple(where or ()),
        keep_unknown=keep_unknown,
    )
    if preview is None and dry_run:
        preview = Path(f"{folder.resolve().name}-filter.html")
    with progress("writing sidecars") as report:
        summary = filter_set(
            folder,
            rules,
            index_folder=index_folder,
            scores=scores,
            dry_run=dry_run,
            preview=preview,
            memory_gb=memory_gb,
            progress=report,
        )
    show(summary, as_json=json)

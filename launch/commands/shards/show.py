"""`internimage shards show`."""

from pathlib import Path
from typing import Annotated

import typer

from launch.commands.options import Json
from launch.commands.shards.options import IndexFolder, SetFolder

EXAMPLE = "internimage shards show shards/web --status dropped --reason 'near*'"


def show(
    folder: SetFolder,
    page: Annotated[Path | None, typer.Option(help="Page to write. [default: SET.html here]")] = None,
    status: Annotated[str | None, typer.Option(help="packed, dropped, erased or rejected.")] = None,
    reason: Annotated[str | None, typer.Option(help="Pattern of the reason, as 'filter: min_side*'.")] = None,
    where: Annotated[str | None, typer.Option(help="Condition over columns, in SQL.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Pictures at most.")] = 200,
    other: Annotated[list[Path] | None, typer.Option(help="Set in which originals of copies are. Repeatable.")] = None,
    index_folder: IndexFolder = None,
    json: Json = False,
) -> None:
    """Draw rows of a set on one HTML page, with their reasons; copies beside their originals."""
    from data_pipeline.curation.decisions import SetPath
    from data_pipeline.curation.showing import show_set
    from launch import display

    summary = show_set(
        SetPath(folder, index_folder),
        page or Path(f"{folder.resolve().name}.html"),
        status=status,
        reason=reason,
        where=where,
        limit=limit,
        others=tuple(SetPath(path) for path in other or ()),
    )
    display.show(summary, as_json=json)

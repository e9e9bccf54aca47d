"""`internimage shards build`."""

from pathlib import Path
from typing import Annotated

import typer

from data_pipeline.errors import DONE
from launch.commands.options import Json
from launch.commands.shards.options import MemoryGb, Workers

EXAMPLE = "internimage shards build cc12m shards/cc12m sources.0.fetch=cc12m.tsv"


def build(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or the bare name of a shipped one.")],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder; a stopped run goes on there.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="As sources.0.fetch=urls.parquet.")
    ] = None,
    forecast: Annotated[
        int | None, typer.Option(min=1, metavar="ROWS", help="Say what so many rows will take, and stop.")
    ] = None,
    workers: Workers = None,
    memory_gb: MemoryGb = 1.0,
    json: Json = False,
) -> int:
    """Carry a recipe out: sources, filter, takedown, dedup, shards, verify; done stages are skipped."""
    import yaml

    from data_pipeline.curation.building import build as carry_out
    from data_pipeline.curation.building import forecast_rows
    from data_pipeline.curation.recipes import load_recipe, recipe_path
    from data_pipeline.errors import UserError
    from launch.display import columns, plain, show
    from launch.progress import progress

    values = {}
    for text in overrides or ():
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"override {text!r}: expected KEY=VALUE")
        values[key] = yaml.safe_load(value)
    found = load_recipe(recipe_path(recipe), values)
    if forecast is not None:
        show(forecast_rows(forecast, found), as_json=json)
        return DONE
    with progress("building") as report:
        done = carry_out(
            found,
            output,
            workers=workers,
            memory_gb=memory_gb,
            progress=report,
            said=lambda stage: typer.echo(f"stage: {stage}", err=True),
        )
    if json:
        show(done, as_json=True)
        return DONE
    rows = [
        (
            step.stage,
            f"{step.rows:,}",
            f"{step.rows - step.left:,}",
            f"{step.left:,}",
            "done before" if step.skipped else ", ".join(f"{why} {count:,}" for why, count in step.lost.items()),
        )
        for step in done.waterfall
    ]
    print(columns(rows, ("stage", "rows", "lost", "left", "")))
    print(f"{plain(done)['samples']:,} samples in {done.shards:,} shards: {output / 'shards'}")
    return DONE

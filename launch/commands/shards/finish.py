"""`internimage shards finish`."""

import typer

from launch.commands.options import Json
from launch.commands.shards.options import LeastPacked, Output

EXAMPLE = "internimage shards finish shards/web"


def finish(output: Output, least_packed: LeastPacked = 0.0, json: Json = False) -> None:
    """Join the parts of a run (pack or fetch with --part I/N) into one set; says which are missing."""
    from data_pipeline.preparation import check_usable
    from data_pipeline.preparation.packing.parts import finish_parts
    from launch.display import show

    done = finish_parts(output)
    show(done, as_json=json)
    check_usable(done, least_packed)


def tell(done: object, output: object, json: bool) -> None:
    """Shows what `--parts` came to: the set, or that other tasks are still at work."""
    from launch.display import show

    if done is not None:
        show(done, as_json=json)
    else:
        typer.echo(
            f"the rest of {output} is being worked on by other tasks; the last of them finishes the set", err=True
        )

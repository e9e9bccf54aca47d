"""`internimage inspect costs`."""

from typing import Annotated

import typer

from launch.commands.options import Config, Json, Overrides

EXAMPLE = "internimage inspect costs internimage_h_m3i_427m --batch 16"


def costs(
    config: Config,
    overrides: Overrides = None,
    batch: Annotated[int, typer.Option(min=1, help="Images of a forward and backward pass.")] = 16,
    json: Json = False,
) -> None:
    """Kernel launches, bytes and FLOPs of a step of a run's image model: a block, a stage, all of it."""
    from launch.display import show_table
    from pretrain.analysis.traffic import costs_table
    from pretrain.configuration import load_config

    show_table(*costs_table(load_config(config, overrides or ()), batch), json)

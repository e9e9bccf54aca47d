"""`internimage inspect checkpoint`."""

from launch.commands.options import Checkpoint, Json

EXAMPLE = "internimage inspect checkpoint runs/h"


def checkpoint(
    path: Checkpoint,
    json: Json = False,
) -> None:
    """Step, sizes and digests of a checkpoint, checked."""
    from launch.display import show
    from pretrain.training.checkpoint.disk import describe

    show(describe(path), as_json=json)

"""`internimage inspect checkpoint`."""

from launch.commands.options import CheckpointPath, Json

EXAMPLE = "internimage inspect checkpoint runs/h"


def checkpoint(
    path: CheckpointPath,
    json: Json = False,
) -> None:
    """Step, sizes and digests of a checkpoint, checked."""
    from launch.display import show
    from pretrain.training.checkpoint.disk import describe_checkpoint

    show(describe_checkpoint(path), as_json=json)

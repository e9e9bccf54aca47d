"""`internimage demo`: the whole way on the embedded set."""

import signal
from pathlib import Path
from typing import Annotated

import typer

EXAMPLE = "internimage demo --output runs/demo"


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for shards, runs and the report.")] = Path(
        "runs/demo"
    ),
    dense: Annotated[
        bool, typer.Option("--dense", help="After the demo: detection and segmentation on scenes of its drawings.")
    ] = False,
) -> int:
    """Shards, pretraining with a stop in the middle, fine-tuning, scores and a report, in minutes."""
    from data_pipeline.errors import StoppedError

    def stop(*_: object) -> None:
        raise StoppedError("asked to stop; the same command goes on where it was")

    signal.signal(signal.SIGTERM, stop)  # by default Python would end here and leave the stage's processes behind
    if dense:
        from pretrain.demo.dense import walk_dense

        return walk_dense(output)
    from pretrain.demo import walk

    return int(walk(output) or 0)

"""`internimage predict`: a run's task on single pictures, drawn and as JSON."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from launch.commands.options import CheckpointChoice, CheckpointPath, Weights, Which

EXAMPLE = "internimage predict runs/mask-rcnn street.jpg --to predictions"


def predict(
    checkpoint: CheckpointPath,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Pictures, or folders of them.")],
    to: Annotated[Path, typer.Option("--to", help="Folder for the drawn pictures and predictions.json.")],
    least: Annotated[float, typer.Option(min=0, max=1, help="Objects of a lower score are not drawn.")] = 0.5,
    choice: CheckpointChoice = "auto",
    which: Weights = Which.ema,
) -> None:
    """Predict classes, boxes, masks or label maps of pictures with a fine-tuned run."""
    from pretrain.evaluation.predict import predict_pictures

    count = predict_pictures(
        checkpoint,
        images,
        to,
        least=least,
        choice=choice,
        which=which.value,
        say=partial(typer.echo, err=True),
    )
    typer.echo(f"{count} pictures: {to}")

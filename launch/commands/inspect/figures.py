"""`internimage inspect erf`, `sampling`, `features`: figures of what a model has learnt."""

from pathlib import Path
from typing import Annotated

import typer

from launch.commands.options import CheckpointChoice, CheckpointPath, Json

ERF_EXAMPLE = "internimage inspect erf runs/h --data shards/held-out --size 224"
SAMPLING_EXAMPLE = "internimage inspect sampling runs/h --pictures 3"
FEATURES_EXAMPLE = "internimage inspect features runs/h --data shards/held-out"

Data = Annotated[Path | None, typer.Option(help="Shard set with the pictures. [default: the run's first source]")]
Pictures = Annotated[int, typer.Option(min=1, help="How many pictures, evenly spaced through the set.")]
Size = Annotated[int | None, typer.Option(min=32, help="Side of the pictures, pixels. [default: the model's]")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Folder. [default: RUN/figures]")]


def erf(
    checkpoint: CheckpointPath,
    data: Data = None,
    pictures: Pictures = 16,
    size: Size = None,
    beside: Annotated[str, typer.Option(help="A ResNet of timm's to stand beside it.")] = "resnet50",
    beside_weights: Annotated[
        Path | None, typer.Option(exists=True, help="Its weights, a file. [default: random]")
    ] = None,
    choice: CheckpointChoice = "auto",
    output: Output = None,
    json: Json = False,
) -> None:
    """Effective receptive field of each stage: trained, untrained, and a ResNet."""
    from pretrain.analysis.figures.receptive_field import erf_figure

    written, rows = erf_figure(
        checkpoint,
        data,
        count=pictures,
        size=size,
        beside=beside,
        beside_weights=beside_weights,
        choice=choice,
        output=output,
    )
    _show(written, rows, json)


def sampling(
    checkpoint: CheckpointPath,
    data: Data = None,
    pictures: Pictures = 3,
    size: Size = None,
    choice: CheckpointChoice = "auto",
    output: Output = None,
    json: Json = False,
) -> None:
    """Where the deformable kernels take their points, drawn on pictures; statistics by stage and group."""
    from pretrain.analysis.figures.sampling import sampling_figure

    written, rows = sampling_figure(checkpoint, data, count=pictures, size=size, choice=choice, output=output)
    _show(written, rows, json)


def features(
    checkpoint: CheckpointPath,
    data: Data = None,
    pictures: Pictures = 6,
    size: Size = None,
    choice: CheckpointChoice = "auto",
    output: Output = None,
    json: Json = False,
) -> None:
    """Patches in the colours of their features' main directions, a row a stage."""
    from pretrain.analysis.figures.features import features_figure

    written, rows = features_figure(checkpoint, data, count=pictures, size=size, choice=choice, output=output)
    _show(written, rows, json)


def _show(written: Path, rows: list[dict[str, object]], json: bool) -> None:
    from launch.display import columns, show, text

    typer.echo(str(written), err=True)
    if json:
        show(rows, as_json=True)
    else:
        typer.echo(columns([[text(value) for value in row.values()] for row in rows], list(rows[0])))

"""`internimage evaluate`: the scores of a checkpoint on a set."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from launch.commands.options import CheckpointChoice, CheckpointPath, Json, Weights, Which

EXAMPLE = "internimage evaluate runs/h --data shards/imagenet-val --task zero-shot"


def evaluate(
    checkpoint: CheckpointPath,
    data: Annotated[Path, typer.Option(help="Folder of the shard set to score on.")],
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task", help="retrieval, zero-shot, top1, ... Repeatable. [default: what the checkpoint and set allow]"
        ),
    ] = None,
    choice: CheckpointChoice = "auto",
    which: Weights = Which.ema,
    classes: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="Text file: the name of each row, a line each. [default: CHECKPOINT's]"
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Run directory for the scores. [default: CHECKPOINT's]")
    ] = None,
    untrained: Annotated[bool, typer.Option(help="Score the untrained model beside it.")] = True,
    label: Annotated[str, typer.Option(help="Put before the scores' names.")] = "",
    json: Json = False,
) -> None:
    """Score a checkpoint: image-text retrieval, zero-shot or top-1 classification."""
    from launch.display import columns, show
    from pretrain import evaluation

    results = evaluation.evaluate(
        checkpoint,
        data,
        tasks=task or [],
        which=which.value,
        choice=choice,
        classes=None if classes is None else classes.read_text(encoding="utf-8").splitlines(),
        batch_size=batch_size,
        output=output,
        untrained=untrained,
        label=label,
        say=partial(typer.echo, err=True),
    )
    if json:
        show(results, as_json=True)
    else:
        typer.echo(columns(evaluation.summary(results.values()), ("", "score", "chance", "beside")))

"""`internimage evaluate`: the scores of a checkpoint on a set."""

from pathlib import Path
from typing import Annotated

import typer

from launch.commands.options import CheckpointPath, Json, Weights, Which

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
    which: Weights = Which.ema,
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
        batch_size=batch_size,
        output=output,
        untrained=untrained,
        label=label,
    )
    if json:
        show(results, as_json=True)
    else:
        typer.echo(columns(evaluation.summary(results.values()), ("", "score", "chance", "beside")))

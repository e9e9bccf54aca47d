"""`internimage evaluate`: the scores of a checkpoint or an export on a set."""

import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from data_pipeline.errors import DONE
from launch.commands.options import CheckpointChoice, CheckpointPath, Json, Processes, Weights, Which

EXAMPLE = "internimage evaluate runs/h --data shards/imagenet-val --task zero-shot"


def evaluate(
    checkpoint: CheckpointPath,
    data: Annotated[Path, typer.Option(help="Shard set, or folder of pictures (a sub-folder a class), to score on.")],
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            help="retrieval, zero-shot, top1, linear-probe, knn, ... Repeatable. [default: what model and set allow]",
        ),
    ] = None,
    choice: CheckpointChoice = "auto",
    which: Weights = Which.ema,
    classes: Annotated[
        str | None,
        typer.Option(help="Name of each row: a text file, a line each, or imagenet-1k|22k. [default: CHECKPOINT's]"),
    ] = None,
    train: Annotated[Path | None, typer.Option(help="Labelled set that linear-probe and knn learn from.")] = None,
    validation: Annotated[
        Path | None, typer.Option(help="Set that chooses the probe's penalty. [default: a fifth of --train]")
    ] = None,
    templates: Annotated[
        str | None, typer.Option(help="Zero-shot prompts: a text file, a line each with {}, or openai|simple.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the scores. [default: CHECKPOINT's run]")
    ] = None,
    untrained: Annotated[bool, typer.Option(help="Score the untrained model beside it.")] = True,
    label: Annotated[str, typer.Option(help="Put before the scores' names.")] = "",
    processes: Processes = "1",
    json: Json = False,
) -> int:
    """Score a run, a checkpoint, an export or the authors' weights; ranks share the work."""
    from launch import invocation, local, machine
    from launch.display import columns, show

    if not invocation.inside_a_launcher() and (count := machine.resolve_processes(processes)) > 1:
        return local.spawn(invocation.own_command(sys.argv[1:]), count)
    from pretrain import evaluation
    from pretrain.evaluation.words import class_names
    from pretrain.evaluation.words import templates as prompts

    with evaluation.shared_by_ranks() as ranks:
        say = partial(typer.echo, err=True) if ranks.leader else _silent
        results = evaluation.evaluate(
            checkpoint,
            data,
            tasks=task or [],
            which=which.value,
            choice=choice,
            classes=None if classes is None else class_names(classes),
            train=train,
            validation=validation,
            templates=() if templates is None else prompts(templates),
            batch_size=batch_size,
            output=output,
            untrained=untrained,
            label=label,
            say=say,
        )
    if not ranks.leader:
        return DONE
    if json:
        show(results, as_json=True)
    else:
        typer.echo(columns(evaluation.summary(results.values()), ("", "score", "chance", "beside")))
    return DONE


def _silent(_: str) -> None:
    """What the other ranks say, the leader has said."""

"""What follows training: `evaluate`, `export`, `report`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from data_pipeline.errors import DONE


class Which(StrEnum):
    ema = "ema"
    model = "model"


class Format(StrEnum):
    safetensors = "safetensors"
    official = "official"
    timm = "timm"
    hf = "hf"
    onnx = "onnx"


Checkpoint = Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A run directory, or one of its checkpoints.")]
Weights = Annotated[Which, typer.Option(help="The averaged weights or the trained ones.")]


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: internimage evaluate runs/h --data shards/imagenet-val --task zero-shot")(evaluate)
    app.command(epilog="Example: internimage export runs/h --to official internimage_h.pth")(export)
    app.command(epilog="Example: internimage report runs/h")(report)


class EvaluationTask(StrEnum):
    retrieval = "retrieval"
    zero_shot = "zero-shot"
    top1 = "top1"


def evaluate(
    checkpoint: Checkpoint,
    data: Annotated[Path, typer.Option("--data", help="Folder of the shard set to score on.")],
    task: Annotated[
        list[EvaluationTask] | None,
        typer.Option("--task", help="Repeatable. Default: what the checkpoint and set allow."),
    ] = None,
    which: Weights = Which.ema,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Run directory for the scores. [default: CHECKPOINT's]")
    ] = None,
    untrained: Annotated[bool, typer.Option(help="Score the untrained model beside it.")] = True,
    label: Annotated[str, typer.Option(help="Put before the scores' names.")] = "",
    json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> int:
    """Score a checkpoint: image-text retrieval, zero-shot or top-1 classification."""
    from pretrain.evaluation import evaluate as work
    from pretrain.evaluation import summary

    results = work(
        checkpoint,
        data,
        tasks=[t.value for t in task or []],
        which=which.value,
        batch_size=batch_size,
        output=output,
        untrained=untrained,
        label=label,
    )
    from launch.display import columns, show

    if json:
        show(results, as_json=True)
    else:
        typer.echo(columns(summary(results.values()), ("", "score", "chance", "beside")))
    return DONE


def export(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="File or folder to write.")],
    to: Annotated[Format, typer.Option("--to", help="Layout of the exported backbone.")],
    which: Weights = Which.ema,
) -> int:
    """Write the backbone for other tools: official keys, timm, Hugging Face, ONNX, safetensors."""
    from pretrain.handoff import export as work

    typer.echo(str(work(checkpoint, to.value, out, which=which.value)))
    return DONE


def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]) -> int:
    """Write RUN/report.html: curves, throughput, samples and scores on one page."""
    from pretrain.report import write_report

    typer.echo(str(write_report(run)))
    return DONE

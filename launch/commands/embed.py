"""`internimage embed`: a vector for every sample of a set."""

import sys
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from data_pipeline.errors import DONE
from launch.commands.options import CheckpointChoice, CheckpointPath, Processes, Weights, Which

EXAMPLE = "internimage embed runs/h --data shards/cc12m --to cc12m.parquet"


class Features(StrEnum):
    auto = "auto"
    text = "text"
    mean = "mean"


def embed(
    checkpoint: CheckpointPath,
    data: Annotated[Path, typer.Option(help="Shard set, or folder of pictures.")],
    to: Annotated[Path, typer.Option(help="File to write: .parquet (with keys), or .npy (and .keys.txt beside it).")],
    features: Annotated[
        Features, typer.Option(help="text: what meets the text; mean: the last map's mean; auto: text where there is.")
    ] = Features.auto,
    choice: CheckpointChoice = "auto",
    which: Weights = Which.ema,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    processes: Processes = "1",
) -> int:
    """Write a float16 vector for every sample; the same command goes on after a stop."""
    from launch import invocation, local, machine

    if not invocation.inside_a_launcher() and (count := machine.resolve_processes(processes)) > 1:
        return local.spawn(invocation.own_command(sys.argv[1:]), count)
    from pretrain import evaluation

    with evaluation.shared_by_ranks() as ranks:
        written = evaluation.embed(
            checkpoint,
            data,
            to,
            features=features.value,
            which=which.value,
            choice=choice,
            batch_size=batch_size,
            say=partial(typer.echo, err=True),
        )
    if ranks.leader:
        typer.echo(str(written))
    return DONE

"""`internimage export`: the backbone in the layout of another tool."""

from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from launch.commands.options import CheckpointChoice, CheckpointPath, Weights, Which

EXAMPLE = "internimage export runs/h --to official internimage_h.pth"


class Format(StrEnum):
    safetensors = "safetensors"
    official = "official"
    mmdet = "mmdet"
    timm = "timm"
    hf = "hf"
    onnx = "onnx"


def export(
    checkpoint: CheckpointPath,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="File or folder to write.")],
    to: Annotated[Format, typer.Option("--to", help="Layout of the exported backbone.")],
    choice: CheckpointChoice = "auto",
    which: Weights = Which.ema,
) -> None:
    """Write the backbone for other tools: official keys, timm, Hugging Face, ONNX, safetensors."""
    from pretrain import handoff

    say = partial(typer.echo, err=True)
    typer.echo(str(handoff.export(checkpoint, to.value, out, which=which.value, choice=choice, say=say)))

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
    open_clip = "open_clip"
    onnx = "onnx"
    pt2 = "pt2"


def export(
    checkpoint: CheckpointPath,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="File or folder to write.")],
    to: Annotated[Format, typer.Option("--to", help="Layout of the exported backbone.")],
    choice: CheckpointChoice = "auto",
    which: Weights = Which.ema,
    opset: Annotated[int | None, typer.Option(help="onnx: version of the operators. [default: 20]")] = None,
    free_size: Annotated[bool, typer.Option(help="onnx: images of any size in steps of 32 pixels; slow.")] = False,
) -> None:
    """Write the model for other tools: official, timm, Hugging Face, open_clip, ONNX, torch.export, safetensors."""
    from pretrain import handoff

    say = partial(typer.echo, err=True)
    onnx = handoff.OnnxOptions(opset or 20, free_size) if opset or free_size else None
    typer.echo(str(handoff.export(checkpoint, to.value, out, which=which.value, choice=choice, onnx=onnx, say=say)))

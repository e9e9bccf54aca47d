"""The pictures that figures are drawn on, the model that they are of, and where figures are kept."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from data_pipeline.durable import atomic_path, write_durably
from data_pipeline.errors import UserError
from data_pipeline.reading import ImageText, evaluation_batches, normalize
from pretrain.handoff import read_backbone
from pretrain.models import InternImage, create_model
from pretrain.training.checkpoint.disk import AUTO, find_checkpoint, is_run, run_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FOLDER = "figures"


@dataclass(frozen=True)
class Drawn:
    """A model, the same untrained, and pictures for both. shown: uint8 [N, S, S, 3]; images: normalised [N, 3, S, S].

    folder: where the figures of this model are kept by default.
    """

    model: InternImage
    untrained: InternImage
    shown: Tensor
    images: Tensor
    title: str
    folder: Path


def draw_on(
    checkpoint: Path | str, data: Path | str | None, *, count: int, size: int | None = None, choice: str = AUTO
) -> Drawn:
    """`count` pictures, evenly spaced through the set, at `size` pixels; by default those of the model.

    data: a shard set; by default the first that the run was trained on. Raises UserError where there is none.
    """
    path = Path(checkpoint)
    backbone = read_backbone(path, choice=choice)
    model = backbone.build()
    torch.manual_seed(0)
    untrained = create_model("custom", **model.arguments).eval()
    if data is None:
        if not is_run(path):
            raise UserError(f"{path}: a file does not say where pictures are; name a set (--data)")
        data = find_checkpoint(path, choice).config.data.sources[0].path
    size = size or backbone.image_size
    shown = _spread(data, size, count)
    folder = (run_of(path) if is_run(path) else path.parent) / FOLDER
    images = normalize(shown, backbone.mean, backbone.std).contiguous()
    return Drawn(model, untrained, shown, images, backbone.source, folder)


def _spread(data: Path | str, size: int, count: int) -> Tensor:
    """The first picture of each of `count` equal parts of the set."""
    found = []
    for part in range(count):
        first = next(iter(evaluation_batches(data, size, 1, ImageText(), rank=part, world_size=count)), None)
        if first is not None:
            found.append(first.views[:, 0].clone())
    if not found:
        raise UserError(f"{data}: no picture in it")
    return torch.cat(found)


def keep(figure: "Figure", name: str, numbers: Mapping[str, Any], drawn_folder: Path, output: Path | None) -> Path:
    """Write NAME.png and NAME.json ({"title", "caption", "rows", ...}) into `output`, by default the run's figures."""
    folder = output or drawn_folder
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / f"{name}.png") as temporary:
        figure.savefig(temporary, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})
    write_durably(folder / f"{name}.json", json.dumps(numbers, indent=1) + "\n")
    return folder / f"{name}.png"


def blank(rows: int, columns: int, width: float, height: float) -> tuple["Figure", list[list[Any]]]:
    """A figure of rows x columns axes without ticks; width, height: of one, in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = [[figure.add_subplot(rows, columns, row * columns + column + 1) for column in range(columns)]
            for row in range(rows)]  # fmt: skip
    for line in axes:
        for axis in line:
            axis.set_xticks([])
            axis.set_yticks([])
    return figure, axes

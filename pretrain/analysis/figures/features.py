"""Patches in the colours of their features' three main directions: what looks alike to the model has one colour."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.analysis.figures.pictures import blank, draw_on, keep
from pretrain.models import InternImage
from pretrain.training.checkpoint.disk import AUTO


def main_colours(features: Tensor) -> tuple[Tensor, list[float]]:
    """[N, H, W, D] -> [N, H, W, 3] in [0, 1], the first three principal components of all patches together, and the
    share of the variance that each explains. A component's sign is that of its largest weight.
    """
    patches = features.flatten(0, 2).double()
    centred = patches - patches.mean(0)
    _, spread, directions = torch.linalg.svd(centred, full_matrices=False)
    directions = directions[:3] * directions[:3].gather(1, directions[:3].abs().argmax(1, keepdim=True)).sign()
    shown = centred @ directions.T
    low, high = (torch.quantile(shown[:1_000_000], q, dim=0) for q in (0.02, 0.98))
    scaled = ((shown - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    shares = (spread.square() / spread.square().sum().clamp_min(1e-30))[:3]
    return scaled.view(*features.shape[:3], -1).float(), shares.tolist()


def features_figure(
    checkpoint: Path | str,
    data: Path | str | None = None,
    *,
    count: int = 6,
    size: int | None = None,
    choice: str = AUTO,
    output: Path | None = None,
) -> tuple[Path, list[dict[str, Any]]]:
    """Draw the pictures, and below them the four stages of the model and the last stage of the same untrained."""
    drawn = draw_on(checkpoint, data, count=count, size=size, choice=choice)
    maps = {f"stage {i + 1}": feature for i, feature in enumerate(_stages(drawn.model, drawn.images))}
    maps["stage 4, untrained"] = _stages(drawn.untrained, drawn.images)[3]
    figure, axes = blank(1 + len(maps), len(drawn.images), 1.7, 1.75)
    for axis, picture in zip(axes[0], drawn.shown, strict=True):
        axis.imshow(picture.numpy())
    rows: list[dict[str, Any]] = []
    for line, (name, feature) in zip(axes[1:], maps.items(), strict=True):
        coloured, shares = main_colours(feature)
        rows.append({"map": name} | {f"component {i + 1}": share for i, share in enumerate(shares)})
        line[0].set_ylabel(name, fontsize=8)
        for axis, picture in zip(line, coloured, strict=True):
            axis.imshow(picture.numpy(), interpolation="nearest")
    numbers = {
        "title": "Features of patches",
        "caption": "First three principal components of each stage's features, over all patches of these pictures, as "
        f"red, green and blue; in the table the share of the variance that each explains. {drawn.title}.",
        "rows": rows,
    }
    return keep(figure, "features", numbers, drawn.folder, output), rows


@torch.no_grad()
def _stages(model: InternImage, images: Tensor) -> list[Tensor]:
    return model.forward_stages(images)

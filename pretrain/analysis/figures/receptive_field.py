"""Effective receptive fields: how much each pixel of the picture moves the centre of each stage's feature.

Luo et al., "Understanding the Effective Receptive Field in Deep Convolutional Neural Networks" (2016): the absolute
gradient of the centre, averaged over pictures. Its size as in RepLKNet (Ding et al. 2022,
table 10): the share of the picture's area of the smallest centred square that holds 20, 50 and 99 % of it. The figure
is InternImage's figure 6 (Wang et al. 2023).
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.analysis.figures.pictures import blank, draw_on, keep
from pretrain.models import InternImage
from pretrain.training.checkpoint.disk import AUTO

SHARES = (0.2, 0.5, 0.99)
Stages = Callable[[Tensor], Sequence[Tensor]]  # images -> the stages' features [B, C, H, W]


def receptive_field(stages: Stages, images: Tensor) -> list[Tensor]:
    """For each stage a map [S, S] whose values add up to 1. images: [N, 3, S, S], taken one by one.

    The centre is read in a direction of its channels drawn for each picture: their sum, and the sum of their squares,
    are the same everywhere behind a LayerNorm, and have no gradient.
    """
    draw = torch.Generator().manual_seed(0)
    maps: list[Tensor] = []
    for image in images:
        pixels = image[None].clone().requires_grad_()
        features = stages(pixels)
        for place, feature in enumerate(features):
            height, width = feature.shape[2:]
            centre = feature[0, :, height // 2, width // 2] @ torch.randn(feature.shape[1], generator=draw)
            (gradient,) = torch.autograd.grad(centre, pixels, retain_graph=place + 1 < len(features))
            seen = gradient[0].abs().sum(0)
            if len(maps) <= place:
                maps.append(torch.zeros_like(seen))
            maps[place] += seen
    return [total / total.sum().clamp_min(1e-30) for total in maps]


def area(field: Tensor, share: float) -> float:
    """Share of the picture in the smallest square around its centre that holds `share` of the field [S, S]."""
    size = field.shape[0]
    middle = size // 2
    for half in range(1, size):
        low, high = max(0, middle - half), min(size, middle + half)
        if field[low:high, low:high].sum() >= share - 1e-6:
            return (high - low) ** 2 / size**2
    return 1.0


def stages_of(model: InternImage) -> Stages:
    return lambda images: [feature.permute(0, 3, 1, 2) for feature in model.forward_stages(images)]


def resnet(name: str, weights: Path | None) -> Stages:
    """A ResNet of timm's; strides 4 to 32. weights: a file of its own; None for random ones."""
    import timm

    torch.manual_seed(0)
    # timm starts residual branches at 0, where an untrained ResNet looks through its shortcuts alone.
    options: dict[str, Any] = {"checkpoint_path": str(weights)} if weights else {"zero_init_last": False}
    model: nn.Module = timm.create_model(name, features_only=True, out_indices=(1, 2, 3, 4), **options).eval()
    return model


def erf_figure(
    checkpoint: Path | str,
    data: Path | str | None = None,
    *,
    count: int = 16,
    size: int | None = None,
    beside: str = "resnet50",
    beside_weights: Path | None = None,
    choice: str = AUTO,
    output: Path | None = None,
) -> tuple[Path, list[dict[str, Any]]]:
    """Draw the four stages of the model, of the same untrained, and of a ResNet of timm's; (the PNG, its numbers).

    count: pictures to average over. size: pixels; by default those of the model.
    """
    drawn = draw_on(checkpoint, data, count=count, size=size, choice=choice)
    known = "its own weights" if beside_weights else "random weights"
    models = {
        "trained": stages_of(drawn.model),
        "untrained": stages_of(drawn.untrained),
        f"{beside}, {known}": resnet(beside, beside_weights),
    }
    fields = {name: receptive_field(stages, drawn.images) for name, stages in models.items()}
    figure, axes = blank(len(fields), 4, 2.4, 2.6)
    rows: list[dict[str, Any]] = []
    for line, (name, maps) in zip(axes, fields.items(), strict=True):
        for stage, (axis, field) in enumerate(zip(line, maps, strict=True)):
            areas = {share: area(field, share) for share in SHARES}
            rows.append({"model": name, "stage": stage + 1} | {f"area {s:.0%}": a for s, a in areas.items()})
            axis.imshow((field / field.max()).sqrt().numpy(), cmap="magma", vmin=0, vmax=1)
            axis.set_title(f"{name}\nstage {stage + 1}: 50 % in {areas[0.5]:.1%}", fontsize=8)
    numbers = {
        "title": "Effective receptive fields",
        "caption": "Absolute gradient of the centre of each stage with respect to the picture (its square root), mean "
        f"of {len(drawn.images)} pictures of {drawn.images.shape[-1]} px; in the table the share of the picture's area "
        f"that holds 20, 50 and 99 % of it. {drawn.title}.",
        "rows": rows,
    }
    return keep(figure, "erf", numbers, drawn.folder, output), rows

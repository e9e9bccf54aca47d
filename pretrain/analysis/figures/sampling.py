"""Where the deformable kernels take their points, and how they weight them: drawn on pictures, and as statistics."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dcnv3 import DCNv3
from dcnv3.reference import activate, unpack
from pretrain.analysis.figures.pictures import Drawn, blank, draw_on, keep
from pretrain.models import InternImage
from pretrain.training.checkpoint.disk import AUTO

STRIDES = (4, 8, 16, 32)
CHOSEN = ((0.5, 0.5), (0.3, 0.35), (0.7, 0.6))  # pixels, as shares of the picture's width and height


def places(packed: Tensor, layer: DCNv3) -> tuple[Tensor, Tensor]:
    """Where `layer` samples its map and with what weight, from what its projection gives.

    packed: [N, H, W, P]. Returns locations [N, H, W, G, K, 2] as (x, y) in pixels of the map, and weights
    [N, H, W, G, K] (dcnv3/reference.py is the definition).
    """
    g = layer.geometry
    offset, mask, _ = unpack(packed, g, layer.center_scale is not None)
    shift = offset.unflatten(-1, (g.groups, g.points, 2)).float()
    weight = activate(mask.unflatten(-1, (g.groups, g.points)).float(), g.activation)
    radius = torch.tensor([g.dilation_w * (g.kernel_w - 1) >> 1, g.dilation_h * (g.kernel_h - 1) >> 1])
    cells = torch.tensor(g.cells(), dtype=torch.float32) * torch.tensor([g.dilation_w, g.dilation_h]) - radius
    height, width = packed.shape[1:3]
    grid = torch.stack(torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy"), -1)
    start = grid * torch.tensor([g.stride_w, g.stride_h]) - torch.tensor([g.padding_w, g.padding_h]) + radius
    return start[None, :, :, None, None].float() + (cells + shift) * g.offset_scale, weight


@torch.no_grad()
def sampled_by_stage(model: InternImage, images: Tensor) -> list[tuple[Tensor, Tensor]]:
    """`places` of the last block of each of the four stages."""
    found: list[tuple[Tensor, Tensor]] = []
    handles = []
    for stage in model.stages:
        layer = stage.blocks[-1].dcn

        def note(_: nn.Module, __: Any, packed: Tensor, layer: DCNv3 = layer) -> None:
            found.append(places(packed, layer))

        # The layer of the offsets is called with the others, and gives what all of them give.
        handles.append(layer.offset.register_forward_hook(note))
    try:
        model.forward_stages(images)
    finally:
        for handle in handles:
            handle.remove()
    return found


def statistics(sampled: list[tuple[Tensor, Tensor]], untouched: list[tuple[Tensor, Tensor]]) -> list[dict[str, Any]]:
    """For each stage and group: the mean distance of a point from its place in the regular grid, in pixels of the map
    and of the picture; the reach, 95 % of the points lie within; the share of the weight of the heaviest point.

    untouched: the same of a model whose offsets are 0.
    """
    rows = []
    for stage, ((locations, weights), (regular, _)) in enumerate(zip(sampled, untouched, strict=True)):
        moved = (locations - regular).norm(dim=-1)
        reach = (locations - regular.mean(-2, keepdim=True)).norm(dim=-1)
        for group in range(moved.shape[3]):
            mine = moved[..., group, :]
            rows.append(
                {
                    "stage": stage + 1,
                    "group": group + 1,
                    "offset, px of the map": mine.mean().item(),
                    "offset, px of the picture": mine.mean().item() * STRIDES[stage],
                    "reach 95 %, px of the picture": torch.quantile(
                        reach[..., group, :].flatten()[:1_000_000], 0.95
                    ).item()
                    * STRIDES[stage],
                    "heaviest point": weights[..., group, :].amax(-1).mean().item(),
                }
            )
    return rows


def sampling_figure(
    checkpoint: Path | str,
    data: Path | str | None = None,
    *,
    count: int = 3,
    size: int | None = None,
    choice: str = AUTO,
    output: Path | None = None,
) -> tuple[Path, list[dict[str, Any]]]:
    """Draw the points of three pixels of each picture and stage, coloured by group, as large as their weight."""
    drawn = draw_on(checkpoint, data, count=count, size=size, choice=choice)
    sampled = sampled_by_stage(drawn.model, drawn.images)
    regular = [(_regular(locations, drawn, stage), weights) for stage, (locations, weights) in enumerate(sampled)]
    figure, axes = blank(len(drawn.images), 4, 2.8, 3.0)
    for picture, line in enumerate(axes):
        for stage, axis in enumerate(line):
            locations, weights = (part[picture] for part in sampled[stage])
            _draw(axis, drawn.shown[picture], locations, weights, regular[stage][0][picture], STRIDES[stage])
            if not picture:
                axis.set_title(f"stage {stage + 1}, last block", fontsize=9)
    rows = statistics(sampled, regular)
    numbers = {
        "title": "Sampling points",
        "caption": "Crosses: pixels of the map; dots: where their kernel takes its points, a colour a group, as large "
        "as the modulation; grey rings: where it takes them before training, on a regular grid. Pictures of "
        f"{drawn.images.shape[-1]} px. {drawn.title}.",
        "rows": rows,
    }
    return keep(figure, "sampling", numbers, drawn.folder, output), rows


def _regular(locations: Tensor, drawn: Drawn, stage: int) -> Tensor:
    """The places of offsets that are all 0."""
    layer = drawn.model.stages[stage].blocks[-1].dcn
    columns = layer.geometry.places(layer.center_scale is not None)
    return places(torch.zeros(*locations.shape[:3], columns), layer)[0]


def _draw(axis: Any, picture: Tensor, locations: Tensor, weights: Tensor, regular: Tensor, stride: int) -> None:
    """picture: uint8 [S, S, 3]. locations, regular [H, W, G, K, 2], weights [H, W, G, K]."""
    height, width, groups, points = weights.shape
    axis.imshow(picture.numpy(), alpha=0.75)
    for x, y in CHOSEN:
        row, column = int(y * height), int(x * width)
        spots = (locations[row, column] + 0.5) * stride - 0.5  # centres of the map's pixels, in the picture's
        size = 4 + 60 * weights[row, column] / weights[row, column].amax().clamp_min(1e-9)
        colour = torch.arange(groups)[:, None].expand(groups, points)
        axis.scatter(
            spots[..., 0].flatten(), spots[..., 1].flatten(), s=size.flatten() / 2, c=colour.flatten(), cmap="hsv",
            vmin=0, vmax=groups, alpha=0.8, linewidths=0,
        )  # fmt: skip
        grid = (regular[row, column, 0] + 0.5) * stride - 0.5
        axis.scatter(grid[:, 0], grid[:, 1], s=22, facecolors="none", edgecolors="dimgrey", linewidths=0.7)
        axis.plot((column + 0.5) * stride - 0.5, (row + 0.5) * stride - 0.5, "+", color="black", markersize=9)
    side = picture.shape[0]
    axis.set_xlim(-0.1 * side, 1.1 * side)
    axis.set_ylim(1.1 * side, -0.1 * side)

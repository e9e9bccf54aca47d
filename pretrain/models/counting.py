"""Parameters and multiply-adds of any InternImage, in closed form: no tensor, no torch.

    parameters(VARIANTS["internimage_g"].arguments).total      # 3076373352
    multiply_adds(VARIANTS["internimage_h"].arguments, 640).total

A multiply-add counts as one. Counted are convolutions, matrix products and the sampling; norms, activations and sums
are not. The sampling costs four a point and channel: a bilinear sum of four corners, with weights (the point's mask
among them) that a group's channels share.

The authors do not state what their figures count. So counted, T to XL round to theirs, and H comes to 0.9 % more, G to
0.4 %. `as_published` is the one convention that was found to round to all seven: of H and G it leaves out the centre
scale and the whole head (the pooled head of T to XL is counted). It was looked for among the terms that a counter may
miss, knowing the answer; it explains nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SAMPLING_COST = 4  # multiply-adds a point and channel


@dataclass(frozen=True)
class Count:
    """By part: stem, the four stages (each with its way down), head."""

    stem: int
    stages: tuple[int, ...]
    head: int

    @property
    def total(self) -> int:
        return self.stem + sum(self.stages) + self.head


@dataclass(frozen=True)
class _Shape:
    """The arguments of InternImage that counting needs, with its defaults."""

    channels: int
    depths: Sequence[int]
    groups: Sequence[int]
    num_classes: int = 1000
    in_chans: int = 3
    mlp_ratio: float = 4.0
    layer_scale: float | None = None
    post_norm: bool = False
    res_post_norm: bool = False
    kernel_size: int = 3
    dw_kernel_size: int | None = None
    remove_center: bool = False
    center_feature_scale: bool = False
    level2_post_norm: bool = False
    level2_post_norm_block_ids: Sequence[int] | None = None
    use_clip_projector: bool = False
    clip_embed_dim: int = 1024
    head_hidden_size: int = 768
    share_weights: bool = True

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> "_Shape":
        return cls(**{name: value for name, value in arguments.items() if name in cls.__dataclass_fields__})

    @property
    def points(self) -> int:
        return self.kernel_size**2 - self.remove_center

    @property
    def depthwise(self) -> int:
        return self.kernel_size if self.dw_kernel_size is None else self.dw_kernel_size

    @property
    def widths(self) -> list[int]:
        return [self.channels * 2**stage for stage in range(4)]


def parameters(arguments: Mapping[str, Any]) -> Count:
    """Parameters of InternImage(**arguments), buffers not counted. Missing arguments have InternImage's defaults."""
    shape = _Shape.of(arguments)
    c = shape.channels
    stem = _linear(9 * shape.in_chans, c // 2) + 2 * (c // 2) + _linear(9 * (c // 2), c) + 2 * c
    stages = []
    for stage, (width, depth, groups) in enumerate(zip(shape.widths, shape.depths, shape.groups, strict=True)):
        count = depth * _block_parameters(shape, width, groups)
        if shape.center_feature_scale or not shape.post_norm:
            count += 2 * width
        if stage == 2 and shape.level2_post_norm:
            count += 2 * width * len(shape.level2_post_norm_block_ids or ())
        if stage < 3:
            count += 9 * width * 2 * width + 2 * 2 * width
        stages.append(count)
    return Count(stem, tuple(stages), _head_parameters(shape))


def multiply_adds(
    arguments: Mapping[str, Any], image_size: int | tuple[int, int], *, as_published: bool = False
) -> Count:
    """Multiply-adds of one image's forward pass through InternImage(**arguments).

    image_size: pixels, or (height, width). as_published: see the module's docstring.

    The CLIP projector is counted with its keys and values made for every token, as the published figure is;
    heads.AttentionPool does the same with less.
    """
    shape = _Shape.of(arguments)
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    c = shape.channels
    height, width = _half(height), _half(width)
    stem = height * width * 9 * shape.in_chans * (c // 2)
    height, width = _half(height), _half(width)
    stem += height * width * 9 * (c // 2) * c
    stages, pixels = [], []
    for stage, (channels, depth, groups) in enumerate(zip(shape.widths, shape.depths, shape.groups, strict=True)):
        pixels.append(height * width)
        count = depth * height * width * _block_cost(shape, channels, groups, as_published)
        if stage < 3:
            height, width = _half(height), _half(width)
            count += height * width * 9 * channels * 2 * channels
        stages.append(count)
    return Count(stem, tuple(stages), _head_cost(shape, pixels, as_published))


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def _block_parameters(shape: _Shape, width: int, groups: int) -> int:
    hidden = int(width * shape.mlp_ratio)
    unshared = 1 if shape.share_weights else shape.points
    count = _linear(width, width) + _linear(width * unshared, width)
    count += shape.depthwise**2 * width + width + 2 * width
    count += _linear(width, groups * shape.points * 3)
    count += _linear(width, groups) if shape.center_feature_scale else 0
    count += _linear(width, hidden) + _linear(hidden, width) + 2 * 2 * width
    if shape.layer_scale is not None:
        count += 2 * width
    elif shape.res_post_norm and not shape.post_norm:
        count += 2 * 2 * width
    return count


def _block_cost(shape: _Shape, width: int, groups: int, as_published: bool) -> int:
    """Multiply-adds of a block for one pixel."""
    unshared = 1 if shape.share_weights else shape.points
    cost = width * width * (1 + unshared) + shape.depthwise**2 * width + width * groups * shape.points * 3
    cost += SAMPLING_COST * shape.points * width
    if shape.center_feature_scale and not as_published:
        cost += width * groups
    return cost + 2 * width * int(width * shape.mlp_ratio)


def _head_parameters(shape: _Shape) -> int:
    *_, c3, c4 = shape.widths
    if not shape.use_clip_projector:
        hidden = c4 * 3 // 2
        return c4 * hidden + 2 * hidden + _classifier(hidden, shape.num_classes)
    d, hidden = shape.clip_embed_dim, shape.head_hidden_size
    fused = _linear(c4, 4 * d) + _linear(c3, d)
    attention = 3 * (2 * d + _linear(d, d)) + _linear(d, hidden)
    return fused + attention + 2 * hidden + _classifier(hidden, shape.num_classes)


def _classifier(hidden: int, num_classes: int) -> int:
    return _linear(hidden, num_classes) if num_classes else 0


def _head_cost(shape: _Shape, pixels: Sequence[int], as_published: bool) -> int:
    *_, c3, c4 = shape.widths
    *_, pixels3, pixels4 = pixels
    if not shape.use_clip_projector:
        hidden = c4 * 3 // 2
        return pixels4 * c4 * hidden + hidden * shape.num_classes
    if as_published:
        return 0
    d, hidden = shape.clip_embed_dim, shape.head_hidden_size
    fused = pixels4 * c4 * 4 * d + pixels3 * c3 * d
    attention = d * d + 2 * pixels3 * d * d + 2 * pixels3 * d
    return fused + attention + d * hidden + hidden * shape.num_classes


def _half(size: int) -> int:
    """Output size of a 3x3 convolution of stride 2 and padding 1."""
    return (size + 1) // 2

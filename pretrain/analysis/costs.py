"""Activations and multiply-adds of what a run computes, in closed form, from shapes alone.

Activations are the values that autograd keeps for the backward pass, counted as this project's modules keep them (a
test compares them with the tensors that PyTorch really saves). What a batch keeps however small it is, is not counted:
the joined weights of the operators' products, for H 83 M values without checkpointing. With checkpointing only the
blocks' inputs are kept, and one block is whole again at a time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pretrain.models.counting import parameters

# Values kept per pixel and channel of a block (pretrain.models.internimage.Block): its input, that of the value's
# projection, the value, depthwise convolution, its norm and GELU, the sampled map, the middle, the MLP's input, and
# twice its fourfold hidden layer.
_BLOCK = 17.0
_LAYER_SCALE = _RES_POST_NORM = 2.0
_TRANSFORMER = 16.0  # values per token and channel of a pre-norm block with fused attention


@dataclass(frozen=True)
class Activations:
    """Values kept (not bytes). `largest_block`: what recomputing one block needs for a moment."""

    kept: float
    largest_block: float = 0.0

    @property
    def peak(self) -> float:
        return self.kept + self.largest_block

    def __add__(self, other: "Activations") -> "Activations":
        return Activations(self.kept + other.kept, max(self.largest_block, other.largest_block))


def image_activations(arguments: Mapping[str, Any], image_size: int, *, checkpointing: bool) -> Activations:
    """Of one image through InternImage(**arguments)."""
    channels = int(arguments.get("channels", 64))
    depths: Sequence[int] = arguments.get("depths", (4, 4, 18, 4))
    groups: Sequence[int] = arguments.get("groups", (4, 8, 16, 32))
    points = int(arguments.get("kernel_size", 3)) ** 2 - bool(arguments.get("remove_center"))
    ratio = float(arguments.get("mlp_ratio", 4.0))
    centre, unshared = bool(arguments.get("center_feature_scale")), not arguments.get("share_weights", True)
    per_channel = _BLOCK + 2.0 * (ratio - 4.0)
    if arguments.get("layer_scale") is not None:
        per_channel += _LAYER_SCALE
    elif arguments.get("res_post_norm") and not arguments.get("post_norm"):
        per_channel += _RES_POST_NORM
    per_place = 3.0 + centre / points  # of a point and group: two offsets, a mask; of a group: the centre's share
    if unshared:  # every point's sampled map is kept apart; with the centre, before it is mixed in and after
        per_channel += (points - 1) * (1 + centre) + centre
        per_place += 1.0  # and the activated mask
    side = image_size / 2
    stem = 3.0 * image_size**2 + 3.0 * side**2 * channels / 2
    side /= 2
    kept = stem + side**2 * channels
    largest = 0.0
    pixels = side**2
    for stage, (depth, count) in enumerate(zip(depths, groups, strict=True)):
        width = channels * 2**stage
        block = pixels * (per_channel * width + per_place * points * count)
        largest = max(largest, block)
        kept += depth * (pixels * width if checkpointing else block)
        if stage < 3:
            kept += pixels * width + pixels / 4 * 2 * width  # the way down: its input, and its norm's
            pixels /= 4
    head = 2.0 * (image_size / 16) ** 2 * float(arguments.get("clip_embed_dim", 1024))
    if not arguments.get("use_clip_projector"):
        head = 3.0 * pixels * channels * 8 * 1.5
    return Activations(kept + head, largest if checkpointing else 0.0)


def training_bytes(arguments: Mapping[str, Any], image_size: int, batch: int) -> float:
    """What training InternImage(**arguments) in fp32 holds at the end of a forward pass, per image of `batch`.

    Its activations, and the image's share of weights, gradients and AdamW's two moments: 16 bytes a parameter.
    """
    activations = image_activations(arguments, image_size, checkpointing=False).kept
    return 4.0 * activations + 16.0 * parameters(arguments).total / batch


def transformer_activations(tokens: float, dim: int, layers: int, *, checkpointing: bool) -> Activations:
    block = _TRANSFORMER * tokens * dim
    if checkpointing:
        return Activations(layers * tokens * dim, block if layers else 0.0)
    return Activations(layers * block)


def transformer_multiply_adds(tokens: float, dim: int, layers: int) -> float:
    """Projections and MLP (12 d^2 a token and layer) and the two products of attention."""
    return layers * tokens * (12.0 * dim**2 + 2.0 * tokens * dim)

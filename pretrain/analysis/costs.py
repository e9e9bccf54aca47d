"""Activations and multiply-adds of what a run computes beside its image encoder, in closed form, from shapes alone.

Activations are the values that autograd keeps for the backward pass (pretrain.models.activations).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pretrain.models.activations import Activations, image_activations
from pretrain.models.counting import parameters

if TYPE_CHECKING:
    from torch import nn

_TRANSFORMER = 16.0  # values per token and channel of a pre-norm block with fused attention


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


def text_tower_shape(tower: "nn.Module") -> tuple[int, int]:
    """(width, layers) of open_clip's text tower, whether it was given by sizes or by a model's name."""
    layers = len(list(tower.get_submodule("transformer.resblocks").children()))
    return int(tower.get_parameter("ln_final.weight").numel()), layers


def text_tower_multiply_adds(tower: "nn.Module", tokens: int) -> float:
    """Of one text: the blocks' matrices once a token, the two products of attention, the projection of one token."""
    width, layers = text_tower_shape(tower)
    matrices = sum(p.numel() for p in tower.get_submodule("transformer").parameters() if p.ndim == 2)
    return float(tokens * matrices + layers * 2 * tokens**2 * width + tower.get_parameter("text_projection").numel())

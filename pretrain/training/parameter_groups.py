"""Which lr and weight decay a parameter has, and the merged groups that the optimizer gets.

    decay     0 for biases and for parameters with at most one extent above 1 (norms, tokens); else `weight_decay`
    lr scale  layer_decay ** (depth from the top) inside the image backbone, 1 elsewhere;
              times `offset_lr_scale` for the projections that DCNv3's offsets come from
    muon      under optimizer.name muon: matrices that map features to features. What turns a number into a vector or a
              vector into classes (embeddings, tokens, classifiers), convolutions and vectors stay with AdamW

There is one group per distinct (lr scale, decay, muon), not one per tensor: a backbone of 40 blocks has about 80
groups, not 1,300. Layer-wise decay follows BEiT's rule (Bao et al. 2021): stem at the bottom, block k above block k-1,
heads at the full lr. A downsampling or a norm at the end of a stage counts with the stage's last block, a norm between
blocks with the block before it.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pretrain.configuration.schema import OptimizerConfig
from pretrain.tasks.module import BackboneLayout

_STAGE = re.compile(r"(?:^|\.)(?:levels|stages)\.(\d+)\.(.*)$")
_BLOCK = re.compile(r"^blocks\.(\d+)\.")
_POST_NORM = re.compile(r"^post_norms\.(\d+)\.")
_STEM = re.compile(r"(?:^|\.)(?:patch_embed|stem)\.")
_NO_MAP = re.compile(r"embedding|token|(?:^|\.)head\.weight$|query|logit")
_OFFSET = re.compile(r"(?:^|\.)offset\.(?:weight|bias)$")


@dataclass(frozen=True)
class ParameterGroup:
    lr_scale: float
    weight_decay: float
    names: tuple[str, ...]
    muon: bool = False


def layer_of(name: str, backbone: BackboneLayout) -> int:
    """0 for the stem, 1 .. n for the blocks, n + 1 for everything above (and for what is not the backbone)."""
    top = sum(backbone.depths) + 1
    if not name.startswith(backbone.prefix):
        return top
    rest = name[len(backbone.prefix) :]
    if _STEM.search(rest):
        return 0
    found = _STAGE.search(rest)
    if found is None:
        return top
    stage, inside = int(found[1]), found[2]
    below = sum(backbone.depths[:stage])
    if block := _BLOCK.match(inside):
        return below + int(block[1]) + 1
    if norm := _POST_NORM.match(inside):
        return below + backbone.post_norm_blocks[int(norm[1])] + 1
    return below + backbone.depths[stage]


def rule(
    name: str, shape: Sequence[int], optimizer: OptimizerConfig, backbone: BackboneLayout | None
) -> tuple[float, float]:
    """(lr scale, weight decay) of one parameter."""
    vector = sum(extent > 1 for extent in shape) <= 1
    decay = 0.0 if vector or name.endswith("bias") else optimizer.weight_decay
    scale = 1.0
    if backbone is not None:
        if optimizer.layer_decay != 1.0:
            scale = optimizer.layer_decay ** (sum(backbone.depths) + 1 - layer_of(name, backbone))
        if name.startswith(backbone.prefix) and _OFFSET.search(name):
            scale *= optimizer.offset_lr_scale
    return scale, decay


def is_map(name: str, shape: Sequence[int]) -> bool:
    """Is it a matrix that Muon orthogonalises?"""
    return len(shape) == 2 and min(shape) > 1 and not _NO_MAP.search(name)


def parameter_groups(
    shapes: Mapping[str, Sequence[int]] | Iterable[tuple[str, Sequence[int]]],
    optimizer: OptimizerConfig,
    backbone: BackboneLayout | None,
) -> list[ParameterGroup]:
    """Names merged by (lr scale, decay, muon), groups and names in the order of first appearance."""
    merged: dict[tuple[float, float, bool], list[str]] = {}
    for name, shape in dict(shapes).items():
        muon = optimizer.name == "muon" and is_map(name, shape)
        merged.setdefault((*rule(name, shape, optimizer, backbone), muon), []).append(name)
    return [ParameterGroup(scale, decay, tuple(names), muon) for (scale, decay, muon), names in merged.items()]

"""InternImage: four stages of deformable-convolution blocks, channels last throughout.

    image [B, 3, S, S] -> stem -> stage1 -> down -> stage2 -> down -> stage3 -> down -> stage4      strides 4, 8, 16, 32
    T S B L XL: stage4 -> ConvHead -> mean -> head        H G: stage3 + stage4 -> FuseStages -> AttentionPool -> fc_norm
    -> head

Wang et al., "InternImage: Exploring Large-Scale Vision Foundation Models with Deformable Convolutions", CVPR 2023. The
entries of the state dict are our own names; `official` maps them to the released checkpoints' and back. timm's
conventions are in TimmFeatures.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dcnv3 import DCNv3
from pretrain.models.activations import Kept, kept_within
from pretrain.models.compilation import compiled_region
from pretrain.models.heads import AttentionPool, ConvHead, FuseStages
from pretrain.models.layers import (
    DropPath,
    LayerNorm,
    Mlp,
    NormGelu,
    ResidualNorm,
    SplitNorm,
    drop_path_factors,
    initial_std,
)
from pretrain.models.linear import linear, use_fast_linears
from pretrain.models.recomputation import recomputed
from pretrain.models.timm_features import TimmFeatures

BlockFactors = tuple[Tensor | None, Tensor | None]  # what drop path multiplies a block's two branches by


@compiled_region
class Stem(nn.Module):
    """Two 3x3 convolutions of stride 2: [B, in_chans, H, W] -> [B, H/4, W/4, C]."""

    def __init__(self, in_chans: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, channels // 2, 3, stride=2, padding=1)
        self.norm1 = NormGelu(channels // 2)
        self.conv2 = nn.Conv2d(channels // 2, channels, 3, stride=2, padding=1)
        self.norm2 = LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(x.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1))
        return self.norm2(self.conv2(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


@compiled_region
class Downsample(nn.Module):
    """3x3 convolution of stride 2 without bias, LayerNorm: [B, H, W, C] -> [B, ceil(H/2), ceil(W/2), 2C]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1, bias=False)
        self.norm = LayerNorm(2 * channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


@compiled_region
class Block(nn.Module):
    """Deformable convolution and MLP, each a residual branch: [B, H, W, C] -> [B, H, W, C].

    The norm stands before the branch (pre), after it (post) or both (res-post, H); layer scale multiplies the branch by
    a vector.
    """

    def __init__(
        self,
        dcn: DCNv3,
        *,
        mlp_ratio: float,
        drop_path: float,
        salt: int,
        layer_scale: float | None,
        post_norm: bool,
        res_post_norm: bool,
    ) -> None:
        super().__init__()
        channels = dcn.channels
        self.post_norm = post_norm
        self.norm1 = LayerNorm(channels) if post_norm else SplitNorm(channels, readers=2)
        self.dcn = dcn
        self.norm2 = LayerNorm(channels) if post_norm else SplitNorm(channels)
        self.mlp = Mlp(channels, int(channels * mlp_ratio))
        self.drop_path1 = DropPath(drop_path, salt)
        self.drop_path2 = DropPath(drop_path, salt + 1)
        self.gamma1: nn.Parameter | None = None
        self.gamma2: nn.Parameter | None = None
        if layer_scale is not None:
            self.gamma1 = nn.Parameter(torch.full((channels,), float(layer_scale)))
            self.gamma2 = nn.Parameter(torch.full((channels,), float(layer_scale)))
        both = res_post_norm and not post_norm and layer_scale is None
        self.res_norm1 = ResidualNorm(channels) if both else None
        self.res_norm2 = ResidualNorm(channels) if both else None
        self.kept: Kept | None = None  # for the backward pass; None for everything

    def forward(self, x: Tensor, factor1: Tensor | None = None, factor2: Tensor | None = None) -> Tensor:
        """factor1, factor2: [B, 1, 1, 1], what drop path multiplies the branches by (drop_path_factors); None for 1."""
        if self.kept is None or not torch.is_grad_enabled():
            return self._branches(x, factor1, factor2)
        widths = self.dcn.channels, self.mlp.fc1.out_features
        return recomputed(self._branches, self.kept, *widths, x, factor1, factor2)

    def _branches(self, x: Tensor, factor1: Tensor | None, factor2: Tensor | None) -> Tensor:
        x = self._with_branch(x, self.norm1, self.dcn, self.res_norm1, self.gamma1, factor1)
        return self._with_branch(x, self.norm2, self.mlp, self.res_norm2, self.gamma2, factor2)

    def _with_branch(
        self,
        x: Tensor,
        norm: nn.Module,
        layer: nn.Module,
        res_norm: nn.Module | None,
        gamma: Tensor | None,
        factor: Tensor | None,
    ) -> Tensor:
        """x + its branch, of which gamma or `res_norm` is the end."""
        if self.post_norm:
            return _add(x, norm(layer(x)), gamma, factor)
        *normals, x = norm(x)
        branch = layer(*normals)
        return _add(x, branch, gamma, factor) if res_norm is None else res_norm(branch, x, factor)


def _add(x: Tensor, branch: Tensor, gamma: Tensor | None, factor: Tensor | None) -> Tensor:
    """x + branch * gamma * factor."""
    if gamma is not None:
        scale = gamma if factor is None else gamma * factor
        return torch.addcmul(x, branch, scale.to(x.dtype)) if branch.dtype == x.dtype else x + branch * scale
    if factor is not None:
        return torch.addcmul(x, branch, factor.to(x.dtype)) if branch.dtype == x.dtype else x + branch * factor
    return x + branch


class Stage(nn.Module):
    """Blocks, a norm, and the way down to the next stage."""

    def __init__(
        self, blocks: Sequence[Block], *, norm: bool, downsample: bool, post_norm_after: Sequence[int]
    ) -> None:
        super().__init__()
        channels = blocks[0].dcn.channels
        self.blocks = nn.ModuleList(blocks)
        self.norm = LayerNorm(channels) if norm else None
        self.post_norm_after = {int(block): index for index, block in enumerate(post_norm_after)}
        self.post_norms = nn.ModuleList([LayerNorm(channels) for _ in post_norm_after])
        self.downsample = Downsample(channels) if downsample else None

    def forward(self, x: Tensor, factors: Sequence[BlockFactors] | None = None) -> Tensor:
        """[B, H, W, C] -> the stage's feature, same shape; `downsample` makes the next stage's input of it.

        factors: of each block; None for the stage to draw its own.
        """
        if factors is None:
            (factors,) = block_factors([self], x)
        for index, block in enumerate(self.blocks):
            x = block(x, *factors[index])
            if index in self.post_norm_after:
                x = self.post_norms[self.post_norm_after[index]](x)
        return x if self.norm is None else self.norm(x)


def block_factors(stages: Iterable[Any], x: Tensor) -> list[list[BlockFactors]]:
    """Drop path's factors of every block of the stages, all drawn at once. x: [B, H, W, C], the first block's input."""
    layers = [layer for stage in stages for block in stage.blocks for layer in (block.drop_path1, block.drop_path2)]
    drawn = iter(drop_path_factors(layers, x))
    return [[(next(drawn), next(drawn)) for _ in stage.blocks] for stage in stages]


class InternImage(TimmFeatures, nn.Module):
    """The backbone with its classifier; see the module's docstring for the picture.

    Args:
        channels: C1, width of the first stage; each stage doubles it.
        depths, groups: blocks and sampling groups of the four stages.
        num_classes: rows of the classifier; 0 for none (forward then gives the vector that it would read).
        in_chans: channels of the image.
        mlp_ratio: hidden width of the MLP over C.
        drop_rate: dropout before the classifier. drop_path_rate: of the last block, growing linearly from 0 at the
            first.
        layer_scale: initial value of gamma1 and gamma2; None for no layer scale.
        offset_scale, remove_center, mask_activation, share_weights, kernel_size, dw_kernel_size, backend: see
            dcnv3.DCNv3.
        post_norm, res_post_norm: where a block's norms stand (see Block).
        level2_post_norm, level2_post_norm_block_ids: LayerNorms after these blocks of the third stage.
        center_feature_scale: of every DCNv3.
        use_clip_projector: the head of H and G: clip_embed_dim is the width of its tokens, head_hidden_size that of the
            pooled vector, clip_heads the heads of its attention.
        global_pool: "avg", or "" for forward to give the map before pooling.
        init_std: standard deviation of the initial values of the MLPs, the attention pool and the classifier; None for
            1 / sqrt(width of the input) each, with which models much narrower than the published ones learn faster.

    Raises ValueError for arguments that cannot be built together.
    """

    def __init__(
        self,
        channels: int = 64,
        depths: Sequence[int] = (4, 4, 18, 4),
        groups: Sequence[int] = (4, 8, 16, 32),
        num_classes: int = 1000,
        *,
        in_chans: int = 3,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        layer_scale: float | None = None,
        offset_scale: float = 1.0,
        post_norm: bool = False,
        dw_kernel_size: int | None = None,
        use_clip_projector: bool = False,
        level2_post_norm: bool = False,
        level2_post_norm_block_ids: Sequence[int] | None = None,
        res_post_norm: bool = False,
        center_feature_scale: bool = False,
        remove_center: bool = False,
        clip_embed_dim: int = 1024,
        head_hidden_size: int = 768,
        clip_heads: int = 16,
        kernel_size: int = 3,
        mask_activation: str = "softmax",
        share_weights: bool = True,
        global_pool: str = "avg",
        init_std: float | None = 0.02,
        backend: str | None = None,
    ) -> None:
        arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        self._arguments = arguments
        _check(channels, depths, groups, level2_post_norm_block_ids if level2_post_norm else ())
        if init_std is not None and not init_std > 0:
            raise ValueError(f"init_std: above 0, or None for 1 / sqrt(width), not {init_std}")
        self.channels, self.depths, self.groups = channels, tuple(depths), tuple(groups)
        self.in_chans, self.drop_rate, self.init_std = in_chans, drop_rate, init_std
        self.use_clip_projector = use_clip_projector
        widths = [channels * 2**stage for stage in range(4)]
        self.stem = Stem(in_chans, channels)
        self.stages = nn.ModuleList()
        index, last = 0, max(sum(depths) - 1, 1)
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            blocks = []
            for _ in range(depth):
                dcn = DCNv3(
                    width,
                    groups[stage],
                    kernel_size=kernel_size,
                    dw_kernel_size=dw_kernel_size,
                    padding=kernel_size // 2,
                    offset_scale=offset_scale,
                    remove_center=remove_center,
                    center_feature_scale=center_feature_scale,
                    mask_activation=mask_activation,
                    share_weights=share_weights,
                    backend=backend,
                    product=linear,
                )
                blocks.append(
                    Block(
                        dcn,
                        mlp_ratio=mlp_ratio,
                        drop_path=drop_path_rate * index / last,
                        salt=2 * index,
                        layer_scale=layer_scale,
                        post_norm=post_norm,
                        res_post_norm=res_post_norm,
                    )
                )
                index += 1
            self.stages.append(
                Stage(
                    blocks,
                    norm=center_feature_scale or not post_norm,
                    downsample=stage < 3,
                    post_norm_after=tuple(level2_post_norm_block_ids or ()) if level2_post_norm and stage == 2 else (),
                )
            )
        if use_clip_projector:
            self.fuse = FuseStages(widths[2], widths[3], clip_embed_dim)
            self.clip_projector = AttentionPool(clip_embed_dim, head_hidden_size, clip_heads, init_std=init_std)
            self.fc_norm = LayerNorm(head_hidden_size)
            self.num_features, self.head_hidden_size = clip_embed_dim, head_hidden_size
        else:
            self.conv_head = ConvHead(widths[3], widths[3] * 3 // 2)
            self.num_features, self.head_hidden_size = widths[3], widths[3] * 3 // 2
        self._init_features(widths)
        self.reset_classifier(num_classes, global_pool)
        self._initialize()
        use_fast_linears(self)

    @property
    def arguments(self) -> dict[str, Any]:
        """What builds this model again, InternImage(**arguments), as JSON can hold it; the classifier's size as it is
        now.
        """
        values = {name: list(v) if isinstance(v, (list, tuple)) else v for name, v in self._arguments.items()}
        return {**values, "num_classes": self.num_classes, "global_pool": self.global_pool}

    def forward_stages(self, x: Tensor) -> list[Tensor]:
        """x: [B, in_chans, H, W] -> the four stages' features, NHWC, strides 4, 8, 16, 32."""
        features = []
        x = self.stem(x)
        for stage, factors in zip(self.stages, block_factors(self.stages, x), strict=True):
            x = stage(x, factors)
            features.append(x)
            if stage.downsample is not None:
                x = stage.downsample(x)
        return features

    def forward_fused(self, x: Tensor) -> Tensor:
        """x: [B, in_chans, H, W] -> [B, H/16, W/16, clip_embed_dim]: stages 3 and 4 as one map. With the CLIP projector
        only.
        """
        if not self.use_clip_projector:
            raise ValueError("forward_fused: this InternImage was built without use_clip_projector")
        *_, x3, x4 = self.forward_stages(x)
        return self.fuse(x3, x4)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, in_chans, H, W] -> logits [B, num_classes]; without a classifier, the vector [B, head_hidden_size]."""
        return self.forward_head(self.forward_features(x))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the blocks' inputs for the backward pass and compute each block again there."""
        for stage in self.stages:
            for block in stage.blocks:
                block.kept = () if enable else None

    def recompute_within(self, budget: float, image_size: int) -> None:
        """Keep for the backward pass what `activations.kept_within` chooses: at most `budget` values an image."""
        for stage, kinds in zip(self.stages, kept_within(budget, self.arguments, image_size), strict=True):
            for block, kept in zip(stage.blocks, kinds, strict=True):
                block.kept = kept

    def _initialize(self) -> None:
        """As published where `init_std` is 0.02: DCNv3 sets its own values, convolutions and what makes the fused map
        keep PyTorch's, other Linears are normal, cut at 2, with that standard deviation.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and ".dcn." not in name and not name.startswith(("fuse", "conv_head")):
                nn.init.trunc_normal_(module.weight, std=initial_std(self.init_std, module.in_features))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


def _check(channels: int, depths: Sequence[int], groups: Sequence[int], post_norm_ids: Sequence[int] | None) -> None:
    if channels < 2 or channels % 2:
        raise ValueError(f"channels: the stem needs an even number, got {channels}")
    if len(depths) != 4 or len(groups) != 4 or min(depths) < 1 or min(groups) < 1:
        raise ValueError(f"depths and groups: four positive numbers each, got {list(depths)} and {list(groups)}")
    for stage, count in enumerate(groups):
        if channels * 2**stage % count:
            raise ValueError(
                f"groups: stage {stage + 1} has {channels * 2**stage} channels, not divisible by {count} groups"
            )
    if post_norm_ids is None:
        raise ValueError(
            "level2_post_norm: give level2_post_norm_block_ids, the blocks of the third stage that a norm follows"
        )
    wrong = [block for block in post_norm_ids if not 0 <= block < depths[2]]
    if wrong:
        raise ValueError(f"level2_post_norm_block_ids: the third stage has {depths[2]} blocks, there is no {wrong}")

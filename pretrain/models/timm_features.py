"""timm's conventions for a backbone, as a mixin: maps are NCHW here (views of the channels-last ones, nothing is
copied).
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.layers import initial_std


class TimmFeatures:
    """forward_features -> forward_head, forward_intermediates, the classifier's handling, and parameter groups by
    depth.

    `num_features` is the width of what forward_features gives: the last stage, or with the CLIP projector the fused
    stride-16 map. `head_hidden_size` is the width of the vector that the classifier reads.
    """

    num_features: int
    head_hidden_size: int

    def _init_features(self, widths: Sequence[int]) -> None:
        self.feature_info = [
            {"num_chs": width, "reduction": 4 * 2**stage, "module": f"stages.{stage}"}
            for stage, width in enumerate(widths)
        ]

    def forward_features(self: Any, x: Tensor) -> Tensor:
        """x: [B, in_chans, H, W] -> [B, num_features, H', W'], stride 32, or 16 with the CLIP projector."""
        x = self.forward_fused(x) if self.use_clip_projector else self.forward_stages(x)[-1]
        return x.permute(0, 3, 1, 2)

    def forward_head(self: Any, x: Tensor, pre_logits: bool = False) -> Tensor:
        """x: what forward_features gave -> logits [B, num_classes]; with pre_logits [B, head_hidden_size].

        With global_pool "" the result stays a map, [B, ., H', W'].
        """
        x = x.permute(0, 2, 3, 1)
        if self.use_clip_projector:
            if self.global_pool:
                x = self.fc_norm(self.clip_projector(x.flatten(1, 2)))
        else:
            x = self.conv_head(x)
            if self.global_pool:
                x = x.mean((1, 2))
        if self.drop_rate:
            x = F.dropout(x, self.drop_rate, self.training)
        x = x if pre_logits else self.head(x)
        return x if self.global_pool else x.permute(0, 3, 1, 2)

    def forward_intermediates(
        self: Any,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The features of the stages in `indices` (an int n: the last n; None: all), NCHW or NHWC, and the final map.

        Args as in timm; `norm` changes nothing, since a stage's norm belongs to its feature. With `stop_early` the
        stages after the last one asked for do not run (the final map is then the last feature).
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt: NCHW or NHWC, not {output_fmt!r}")
        wanted = _indices(indices, len(self.stages))
        stages = self.stages[: max(wanted) + 1] if stop_early else self.stages
        features, x = [], self.stem(x)
        for index, stage in enumerate(stages):
            if index:
                x = stages[index - 1].downsample(x)
            x = stage(x)
            features.append(x)
        chosen = [features[index] for index in wanted]
        if output_fmt == "NCHW":
            chosen = [feature.permute(0, 3, 1, 2) for feature in chosen]
        if intermediates_only:
            return chosen
        fused = self.use_clip_projector and len(features) == len(self.stages) == 4
        final = self.fuse(features[2], features[3]) if fused else features[-1]
        return final.permute(0, 3, 1, 2), chosen

    def prune_intermediate_layers(
        self: Any, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last one in `indices`, the way down to them, and the head; the indices that remain.

        Nothing is kept that no feature depends on: a parameter without a gradient stops DistributedDataParallel.
        """
        wanted = _indices(indices, len(self.stages))
        self.stages = self.stages[: max(wanted) + 1]
        self.stages[-1].downsample = None
        if prune_head:
            for name in ("fuse", "clip_projector", "fc_norm", "conv_head"):
                if hasattr(self, name):
                    delattr(self, name)
            self.reset_classifier(0, "")
        return wanted

    def get_classifier(self: Any) -> nn.Module:
        return self.head

    def reset_classifier(self: Any, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier of `num_classes` rows (0: none), initialised as the first.

        Raises ValueError for an unknown pooling, and for a classifier without pooling behind the CLIP projector: it
        reads the pooled vector, and the map before it is of another width.
        """
        pool = self.global_pool if global_pool is None else global_pool
        if pool not in ("avg", ""):
            raise ValueError(f"global_pool: 'avg' (the head's own pooling) or '', not {pool!r}")
        if self.use_clip_projector and num_classes > 0 and not pool:
            raise ValueError(
                f"global_pool='' with num_classes={num_classes}: the classifier reads the {self.head_hidden_size} "
                f"values that the CLIP projector pools, not the map of {self.num_features}; give num_classes=0 as well"
            )
        self.global_pool = pool
        self.num_classes = num_classes
        like = next(self.parameters())
        self.head = nn.Identity()
        if num_classes > 0:
            self.head = nn.Linear(self.head_hidden_size, num_classes, device=like.device, dtype=like.dtype)
            nn.init.trunc_normal_(self.head.weight, std=initial_std(self.init_std, self.head_hidden_size))
            nn.init.zeros_(self.head.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return set()

    @torch.jit.ignore
    def group_matcher(self: Any, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that give each parameter its depth, for layer-wise rates: what follows a block counts
        with it.
        """
        if coarse:
            return {"stem": r"^stem", "blocks": r"^stages\.(\d+)"}
        # timm takes the first pattern that matches, and the numbers in its groups (then the fixed ones) as the place.
        after_blocks = [
            (rf"^stages\.{stage}\.(?:norm|downsample)\.", (stage, len(module.blocks) - 1))
            for stage, module in enumerate(self.stages)
        ]
        post_norms = [
            (rf"^stages\.{stage}\.post_norms\.{index}\.", (stage, block))
            for stage, module in enumerate(self.stages)
            for block, index in module.post_norm_after.items()
        ]
        blocks = [(r"^stages\.(\d+)\.blocks\.(\d+)", None)]
        return {"stem": r"^stem", "blocks": after_blocks + post_norms + blocks}


def _indices(indices: int | Sequence[int] | None, count: int) -> list[int]:
    """The stages meant: None all, an int the last so many, negative ones from the end. ValueError outside the range."""
    if indices is None:
        return list(range(count))
    if isinstance(indices, int):
        indices = range(count - indices, count)
    wanted = [index + count if index < 0 else index for index in indices]
    if not wanted or min(wanted) < 0 or max(wanted) >= count:
        raise ValueError(f"indices: {list(indices)} are not among the {count} stages")
    return wanted


def parameters_by_depth(model: nn.Module) -> Iterator[tuple[int, str]]:
    """(depth, parameter name): 0 the stem, then one number a block, the head last, as group_matcher groups them."""
    blocks = model.group_matcher()["blocks"]  # type: ignore[operator]
    order: dict[str, tuple[int, ...]] = {}
    for name, _ in model.named_parameters():
        if name.startswith("stem"):
            order[name] = (-1,)
            continue
        for pattern, fixed in blocks:
            match = re.match(pattern, name)
            if match:
                order[name] = tuple(fixed) if fixed else tuple(int(number) for number in match.groups())
                break
        else:
            order[name] = (len(model.stages),)  # type: ignore[arg-type]
    depth = {place: index for index, place in enumerate(sorted(set(order.values())))}
    for name, place in order.items():
        yield depth[place], name

"""Mask2Former's losses for many ranks: transformers' own, with points that belong to the sample and the joined batch's
averages.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Mask2FormerConfig
from transformers.models.mask2former import modeling_mask2former as theirs

from pretrain.models.randomness import drawing_as
from pretrain.objectives.collectives import summed, world_size
from pretrain.tasks.dense.sampling import SALT_HEADS

# Each layer of the decoder is compared at the same points of a sample, which Mask2Former draws anew.
SALT_MATCHING, SALT_LOSSES = SALT_HEADS + 16, SALT_HEADS + 17
_Matcher: Any = theirs.Mask2FormerHungarianMatcher  # annotated with types that they are not called with
_Loss: Any = theirs.Mask2FormerLoss
Indices = Sequence[tuple[Tensor, Tensor]]  # a sample: queries, and the targets that they are matched with


class KeyedMatcher(_Matcher):  # type: ignore[misc]
    """The matcher, one sample a call, with points that belong to the sample."""

    @torch.no_grad()
    def forward(
        self,
        masks_queries_logits: Tensor,
        class_queries_logits: Tensor,
        mask_labels: Sequence[Tensor],
        class_labels: Sequence[Tensor],
    ) -> list[tuple[Tensor, Tensor]]:
        """As transformers'; a sample without targets is matched with nothing."""
        found: list[tuple[Tensor, Tensor]] = []
        for row in range(len(masks_queries_logits)):
            if not len(class_labels[row]):
                nothing = torch.zeros(0, dtype=torch.int64)
                found.append((nothing, nothing))
                continue
            one = slice(row, row + 1)
            with drawing_as(row, SALT_MATCHING, masks_queries_logits.device):
                found += super().forward(
                    masks_queries_logits[one], class_queries_logits[one], mask_labels[one], class_labels[one]
                )
        return found


class JoinedMask2FormerLoss(_Loss):  # type: ignore[misc]
    """Mask2FormerLoss whose means are over the joined batch of all ranks."""

    def __init__(self, config: Mask2FormerConfig, weight_dict: dict[str, float]) -> None:
        super().__init__(config, weight_dict)
        self.matcher = KeyedMatcher(
            cost_class=config.class_weight,
            cost_mask=config.mask_weight,
            cost_dice=config.dice_weight,
            num_points=self.num_points,
        )

    def get_num_masks(self, class_labels: Sequence[Tensor], device: torch.device) -> Tensor:
        """Masks a rank: what a rank's sums are divided by, so that the mean over ranks is the joined batch's."""
        count = torch.tensor(float(sum(map(len, class_labels))), device=device)
        return summed(count).clamp_min(1) / world_size()

    def loss_labels(
        self, class_queries_logits: Tensor, class_labels: Sequence[Tensor], indices: Indices
    ) -> dict[str, Tensor]:
        """Cross-entropy weighted by class, its weights summed over all ranks."""
        target = torch.full(
            class_queries_logits.shape[:2], self.num_labels, dtype=torch.int64, device=class_queries_logits.device
        )
        for row, (queries, targets) in enumerate(indices):
            target[row, queries.to(target.device)] = class_labels[row][targets.to(target.device)]
        weight = torch.ones(self.num_labels + 1, device=target.device)
        weight[-1] = self.eos_coef
        values = F.cross_entropy(class_queries_logits.transpose(1, 2), target, weight=weight, reduction="sum")
        return {"loss_cross_entropy": values * world_size() / summed(weight[target].sum())}

    def loss_masks(
        self, masks_queries_logits: Tensor, mask_labels: Sequence[Tensor], indices: Indices, num_masks: Tensor
    ) -> dict[str, Tensor]:
        """Sample by sample, each with points of its own."""
        total: dict[str, Tensor] = {}
        for row, (queries, targets) in enumerate(indices):
            if not len(queries):
                continue
            one = slice(row, row + 1)
            with drawing_as(row, SALT_LOSSES, masks_queries_logits.device):
                losses = super().loss_masks(
                    masks_queries_logits[one], mask_labels[one], [(queries, targets)], num_masks
                )
            total = {name: total[name] + loss if name in total else loss for name, loss in losses.items()}
        nothing = masks_queries_logits.sum() * 0  # so that every parameter has a gradient on every rank
        return {name: total.get(name, 0.0) + nothing for name in ("loss_mask", "loss_dice")}

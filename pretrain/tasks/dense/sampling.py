"""Draws of the heads that belong to the sample: the same for any number of ranks, and after a resume."""

import torch
from torch import Tensor

from pretrain.models.randomness import uniforms_of

# Salts of draws made in heads: clear of the layers' small numbers, and of those in objectives.keys (from 1 << 20).
SALT_HEADS = 1 << 24


class KeyedSampler:
    """torchvision's BalancedPositiveNegativeSampler, whose random order belongs to the sample.

    Called within `drawing_from`; matched indices come one tensor a sample, in the order of the keys. `drawn` is the
    number of elements that the last call chose.
    """

    def __init__(self, batch_size_per_image: int, positive_fraction: float, salt: int) -> None:
        self._size, self._fraction, self._salt = batch_size_per_image, positive_fraction, SALT_HEADS + 2 * salt
        self.drawn = torch.zeros(())

    def __call__(self, matched_idxs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Masks uint8 [n] a sample: the chosen ones among the positive (>= 1) and among the negative (0) elements."""
        chosen: tuple[list[Tensor], list[Tensor]] = ([], [])
        for row, matched in enumerate(matched_idxs):
            positive, negative = torch.where(matched >= 1)[0], torch.where(matched == 0)[0]
            wanted = min(len(positive), int(self._size * self._fraction))
            for which, (found, count) in enumerate(
                ((positive, wanted), (negative, min(len(negative), self._size - wanted)))
            ):
                order = uniforms_of(row, len(matched), self._salt + which, matched.device)[found]
                mask = torch.zeros_like(matched, dtype=torch.uint8)
                mask[found[order.argsort(stable=True)[:count]]] = 1
                chosen[which].append(mask)
        self.drawn = torch.stack([mask.sum() for masks in chosen for mask in masks]).sum()
        return chosen

"""Draws of the heads that belong to the sample: the same for any number of ranks, and after a resume."""

import torch
from torch import Tensor

from data_pipeline.hashing import mix_tensor
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

    def __call__(
        self, matched_idxs: list[Tensor], boxes: list[Tensor] | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Masks uint8 [n] a sample: the chosen ones among the positive (>= 1) and among the negative (0) elements.

        boxes: float32 [n, 4] a sample. A draw then belongs to the box rather than to its number, so that one box more
        among the proposals, which rounding may bring, changes no other's.
        """
        chosen: tuple[list[Tensor], list[Tensor]] = ([], [])
        for row, matched in enumerate(matched_idxs):
            places = torch.arange(len(matched), device=matched.device) if boxes is None else places_of(boxes[row])
            positive, negative = torch.where(matched >= 1)[0], torch.where(matched == 0)[0]
            wanted = min(len(positive), int(self._size * self._fraction))
            for which, (found, count) in enumerate(
                ((positive, wanted), (negative, min(len(negative), self._size - wanted)))
            ):
                order = uniforms_of(row, places, self._salt + which)[found]
                mask = torch.zeros_like(matched, dtype=torch.uint8)
                mask[found[order.argsort(stable=True)[:count]]] = 1
                chosen[which].append(mask)
        self.drawn = torch.stack([mask.sum() for masks in chosen for mask in masks]).sum()
        return chosen


def places_of(boxes: Tensor) -> Tensor:
    """int64 [n]: a number for each box [n, 4] in pixels, from its corners to a quarter of a pixel."""
    places = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
    for corner in (boxes * 4).round().long().unbind(1):
        places = mix_tensor(places + corner)
    return places

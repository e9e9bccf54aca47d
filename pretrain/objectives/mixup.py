"""Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019) of the pairs that `pairing` makes, drawn from the pair's
first sample key.

The partner is the neighbour 2i <-> 2i+1 of the global batch, so that what is mixed depends neither on ranks nor on
workers.
"""

import torch
from torch import Tensor

from pretrain.models.randomness import hashed_uniform
from pretrain.objectives.keys import SALT_MIX_BOX_X, SALT_MIX_BOX_Y, SALT_MIX_CHOICE, beta_draws
from pretrain.objectives.mixing import pair_keys, pairing


def mix_pairs(images: Tensor, keys: Tensor, mixup: float, cutmix: float) -> tuple[Tensor, Tensor]:
    """images [B, C, H, W], sample keys int64 [B] -> mixed images, and own share [B] of each (its partner has the
    rest).

    mixup, cutmix: alpha of Beta(alpha, alpha); 0 switches one off, with both on each pair takes either with
    probability 1/2. Raises UserError for an odd B.
    """
    batch, _, height, width = images.shape
    partner = images[pairing(batch, images.device)]
    pair = pair_keys(keys)
    cut = torch.full((batch,), cutmix > 0, device=images.device)
    if mixup > 0 and cutmix > 0:
        cut = hashed_uniform(pair, SALT_MIX_CHOICE) < 0.5
    blend_share = beta_draws(pair, mixup) if mixup > 0 else torch.ones(batch, device=images.device)
    box = _boxes(pair, beta_draws(pair, cutmix), height, width) if cutmix > 0 else None
    weight = blend_share[:, None, None].expand(batch, height, width)
    if box is not None:
        weight = torch.where(cut[:, None, None], (~box).to(weight.dtype), weight)
    share = weight.mean((1, 2))
    weight = weight[:, None].to(images.dtype)
    return weight * images + (1 - weight) * partner, share


def _boxes(keys: Tensor, share: Tensor, height: int, width: int) -> Tensor:
    """bool [B, H, W]: a box of (1 - share) of the area around a uniform centre, clipped at the border (the true share
    is measured after).
    """
    half = (1 - share).sqrt() / 2
    inside = []
    for salt, size in ((SALT_MIX_BOX_Y, height), (SALT_MIX_BOX_X, width)):
        pixel = torch.arange(size, device=keys.device) + 0.5
        centre = hashed_uniform(keys, salt) * size
        inside.append((pixel - centre[:, None]).abs() < half[:, None] * size)
    return inside[0][:, :, None] & inside[1][:, None, :]

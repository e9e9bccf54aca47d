"""The input of the encoder: two images mixed cell by cell, or one image with cells hidden.

    cell grid at 224 px, 32-px cells        x = (1-M) * v1[a] + M * v1[pi(a)]
    . # . # # . .       . first image (25 of 49)
    # . . # . # .       # second image, its pair (24 = floor(49/2))
    ...                 one mask a global batch, so every sample has the same token counts

MixMIM (Liu et al. 2022, arXiv 2205.13137, section 3) mixes two images under one mask of 32-px blocks; its mask is
one a batch, SiameseIM's one a sample (`draw_sample_cells`). Raw pixels are mixed, for the stem's convolutions overlap.
32 px is one cell of stage 4: nothing straddles there. Below 128 px this would leave too few cells, so cells are 16 px
there and a stage-4 position sees both images.
"""

import logging
from typing import NamedTuple

import torch
from torch import Tensor

from data_pipeline.errors import UserError
from pretrain.models.randomness import hashed_uniform
from pretrain.objectives.keys import SALT_MASK, SALT_MIX_PAIR, SALT_SAMPLE_MASK, StepKeys, sample_keys, step_uniform

TOKEN = 16  # pixels a side of a token of the fused map


class Cells(NamedTuple):
    """Which cells are hidden, at three resolutions: one mask for all rows, or (with [B] in front of each) one a row.

    pixels: bool [S, S], True where the second image shows (or where nothing does). visible, hidden: int64 token
    indices into the flattened [S/16 * S/16] map, ascending; as many in every row.
    """

    pixels: Tensor
    visible: Tensor
    hidden: Tensor


def cell_size(image_size: int, configured: int | None) -> int:
    """Side of a mixing cell in pixels. Raises UserError where cells do not tile the image or the token map."""
    cell = configured if configured is not None else (32 if image_size >= 128 else 16)
    if configured is None and cell == 16:
        logging.getLogger(__name__).info("images of %d px: mixing cells of 16 px, below stage 4's 32", image_size)
    if cell < TOKEN or cell % TOKEN or image_size % cell:
        raise UserError(
            f"task.mask_cell {cell}: cells are multiples of {TOKEN} px that tile data.image_size {image_size}; "
            f"choose data.image_size as a multiple of {max(cell, TOKEN)}, or another task.mask_cell"
        )
    return cell


def draw_cells(keys: StepKeys, image_size: int, cell: int, ratio: float, device: torch.device) -> Cells:
    """One mask for the whole global batch of the step: exactly floor(ratio * cells) cells hidden."""
    side = image_size // cell
    order = step_uniform(keys, side * side, SALT_MASK).argsort(stable=True)
    hidden = torch.zeros(side * side, dtype=torch.bool)
    hidden[order[: int(ratio * side * side)]] = True
    grid = hidden.view(side, side)
    tokens = _upsample(grid, cell // TOKEN).flatten()
    return Cells(
        _upsample(grid, cell).to(device), (~tokens).nonzero()[:, 0].to(device), tokens.nonzero()[:, 0].to(device)
    )


def draw_sample_cells(keys: Tensor, image_size: int, cell: int, ratio: float) -> Cells:
    """A mask for each of the sample keys int64 [B], equal for equal keys (`pair_keys`: two images that are mixed need
    each other's); exactly floor(ratio * cells) cells hidden in each.
    """
    side, rows = image_size // cell, len(keys)
    places = torch.arange(side * side, device=keys.device)
    draws = hashed_uniform((keys[:, None] + (places << 32)).flatten(), SALT_SAMPLE_MASK).view(rows, -1)
    grid = torch.zeros_like(draws, dtype=torch.bool)
    grid.scatter_(1, draws.argsort(dim=1, stable=True)[:, : int(ratio * side * side)], True)
    grid = grid.view(rows, side, side)
    tokens = _upsample(grid, cell // TOKEN).flatten(1)
    count = int(ratio * side * side) * (cell // TOKEN) ** 2
    order = tokens.long().argsort(dim=1, stable=True)  # what is visible first, both ascending
    return Cells(_upsample(grid, cell), order[:, : tokens.shape[1] - count], order[:, tokens.shape[1] - count :])


def tokens_at(x: Tensor, index: Tensor) -> Tensor:
    """[B, N, D] at the token indices [n], or [B, n] where each row has its own -> [B, n, D]."""
    if index.ndim == 1:
        return x[:, index]
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def pairing(batch: int, device: torch.device) -> Tensor:
    """pi, int64 [B]: swaps global positions 2i and 2i+1; an involution that stays inside a rank whatever their number.

    Raises UserError where the local batch is odd.
    """
    if batch % 2:
        raise UserError(
            f"this objective mixes images in pairs, and a rank's micro-batch of {batch} is odd: choose "
            "training.batch_size such that batch_size / accumulation / ranks is even"
        )
    return torch.arange(batch, device=device) ^ 1


def pair_keys(keys: Tensor) -> Tensor:
    """Sample keys int64 [B], B even -> for both of each pair the key of its first."""
    return keys.view(-1, 2)[:, 0].repeat_interleave(2)


def partners(positions: Tensor, keys: StepKeys, probability: float) -> Tensor:
    """The involution `pi` of a local batch, int64 [B]: `pairing`, but that a pair left unmixed maps to itself.

    positions: int64 [B], global. Each pair is mixed with `probability`, drawn from its first sample's key. An image
    that is its own partner goes in whole: its visible tokens predict its own view, the hidden ones its other view.
    Raises UserError for an odd B.
    """
    pi = pairing(len(positions), positions.device)
    if probability >= 1:
        return pi
    drawn = hashed_uniform(pair_keys(sample_keys(keys, positions)), SALT_MIX_PAIR)
    return torch.where(drawn < probability, pi, pi ^ 1)


def mix(first: Tensor, second: Tensor, cells: Cells) -> Tensor:
    """[B, S, S, 3] twice -> [B, S, S, 3]: `second` where hidden, `first` elsewhere (raw pixels, any dtype)."""
    return torch.where(cells.pixels[..., None], second, first)


def _upsample(grid: Tensor, factor: int) -> Tensor:
    return grid.repeat_interleave(factor, -2).repeat_interleave(factor, -1)

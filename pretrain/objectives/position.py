"""Where a target view lies, seen from the input view (Siamese Image Modeling, Tao et al. 2022, arXiv 2206.01204,
section 3).

Crops are measured after the whole image was flipped: (i, j, h, w, flip, W), top-left corner, size, and the width W of
the source. A token (r, c) of the target's G x G map lies, in the token units of the input view's map,

    y = G (i2 - i1) / h1 + (h2 / h1) (r + 1/2) - 1/2
    x = G (j2 - j1) / w1 + (w2 / w1) (c + 1/2) - 1/2            both views flipped, or neither
    x = G (W - j1 - j2) / w1 - (w2 / w1) (c + 1/2) - 1/2        one of them flipped

so that the identity view gives (r, c) itself: the absolute embedding, and one code path for intra- and inter-view
targets.
"""

import torch
from torch import Tensor


def relative_parameters(source: Tensor, target: Tensor) -> Tensor:
    """Crops of the input view and of the target view, [B, 6] each -> [B, 6]: dy, dx, h2/h1, w2/w1, flip, dx of the
    flipped case.
    """
    i1, j1, h1, w1, f1, width = source.unbind(-1)
    i2, j2, h2, w2, f2, _ = target.unbind(-1)
    return torch.stack(
        [(i2 - i1) / h1, (j2 - j1) / w1, h2 / h1, w2 / w1, (f1 - f2).abs(), (width - j1 - j2) / w1], dim=-1
    )


def identity_parameters(batch: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """The parameters of a view seen from itself, [B, 6]."""
    return torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0, 0.0], device=device, dtype=dtype).expand(batch, 6)


def token_positions(parameters: Tensor, grid: int) -> tuple[Tensor, Tensor]:
    """[B, 6] -> y, x of the target's tokens, each [B, grid * grid] row by row, in the input view's token units."""
    dy, dx, sy, sx, flip, flipped_dx = (p[:, None] for p in parameters.unbind(-1))
    centre = torch.arange(grid, device=parameters.device, dtype=parameters.dtype) + 0.5
    y = grid * dy + sy * centre - 0.5
    x = torch.where(flip > 0.5, grid * flipped_dx - sx * centre, grid * dx + sx * centre) - 0.5
    shape = (parameters.shape[0], grid, grid)
    return y[:, :, None].expand(shape).flatten(1), x[:, None, :].expand(shape).flatten(1)


def sincos(values: Tensor, dim: int) -> Tensor:
    """[...] -> [..., dim]: sines, then cosines, of wavelengths 2 pi .. 10000 * 2 pi. dim is even."""
    frequency = 10000.0 ** (-torch.arange(dim // 2, device=values.device, dtype=values.dtype) / (dim // 2))
    angle = values[..., None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


def absolute_embedding(grid: int, dim: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """[grid * grid, dim]: half the channels say the row, half the column. dim is divisible by 4."""
    steps = torch.arange(grid, device=device, dtype=dtype)
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    return torch.cat([sincos(y.flatten(), dim // 2), sincos(x.flatten(), dim // 2)], dim=-1)


def relative_embedding(parameters: Tensor, grid: int, dim: int) -> Tensor:
    """[B, 6] -> [B, grid * grid, 2 * dim]: the position's embedding, then that of 10 log of the two scales."""
    y, x = token_positions(parameters, grid)
    place = torch.cat([sincos(y, dim // 2), sincos(x, dim // 2)], dim=-1)
    scale = sincos(10 * parameters[:, 2:4].log(), dim // 2).flatten(1)
    return torch.cat([place, scale[:, None].expand_as(place)], dim=-1)

"""Where the tokens of one view lie in another, against pixels that carry their own coordinates."""

import numpy as np
import pytest
import torch

from pretrain.objectives.position import (
    absolute_embedding,
    identity_parameters,
    relative_embedding,
    relative_parameters,
    token_positions,
)

GRID = 7


def coordinates(crop, width):
    """Source coordinates (before any flip) of the token centres of a crop."""
    top, left, height, crop_width, flip = crop
    rows = top + (np.arange(GRID) + 0.5) / GRID * height
    columns = left + (np.arange(GRID) + 0.5) / GRID * crop_width
    if flip:
        columns = width - columns
    return np.stack(np.meshgrid(rows, columns, indexing="ij"))


@pytest.mark.parametrize("flips", [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_a_token_lies_where_its_source_pixel_lies(flips):
    generator = np.random.default_rng(0)
    for _ in range(20):
        width = float(generator.integers(60, 200))
        crops = []
        for flip in flips:
            h, w = generator.uniform(20, 50, 2)
            crops.append((generator.uniform(0, 40), generator.uniform(0, width - w), h, w, flip))
        tensors = [torch.tensor([[*crop, width]], dtype=torch.float64) for crop in crops]
        y, x = token_positions(relative_parameters(*tensors), GRID)
        # From view 1's token units back to the source: an affine map, mirrored where view 1 is flipped.
        top, left, height, crop_width, flip = crops[0]
        rows = top + (y.view(GRID, GRID).numpy() + 0.5) / GRID * height
        columns = left + (x.view(GRID, GRID).numpy() + 0.5) / GRID * crop_width
        if flip:
            columns = width - columns
        np.testing.assert_allclose(np.stack([rows, columns]), coordinates(crops[1], width), atol=1e-9)


def test_the_view_seen_from_itself_is_the_absolute_embedding():
    crop = torch.tensor([[3.0, 5.0, 40.0, 44.0, 1.0, 90.0]], dtype=torch.float64)
    torch.testing.assert_close(
        relative_parameters(crop, crop)[:, :5], identity_parameters(1, crop.device).double()[:, :5]
    )
    y, x = token_positions(identity_parameters(2, crop.device), GRID)
    assert y[1].tolist() == [r for r in range(GRID) for _ in range(GRID)]
    assert x[1].tolist() == [c for _ in range(GRID) for c in range(GRID)]
    embedded = relative_embedding(identity_parameters(1, crop.device), GRID, 32)[0]
    assert torch.equal(embedded[:, :32], absolute_embedding(GRID, 32, crop.device))


def test_the_mirror_image_of_a_view_reads_its_columns_backwards():
    first = torch.tensor([[0.0, 10.0, 40.0, 30.0, 0.0, 100.0]], dtype=torch.float64)
    mirrored = torch.tensor([[0.0, 60.0, 40.0, 30.0, 1.0, 100.0]], dtype=torch.float64)  # 100 - 10 - 30
    y, x = token_positions(relative_parameters(first, mirrored), GRID)
    torch.testing.assert_close(x.view(GRID, GRID)[0], torch.arange(GRID - 1, -1, -1).double())
    torch.testing.assert_close(y.view(GRID, GRID)[:, 0], torch.arange(GRID).double())


def test_a_half_sized_crop_has_half_the_step_and_its_scale_embedded():
    first = torch.tensor([[0.0, 0.0, 70.0, 70.0, 0.0, 100.0]], dtype=torch.float64)
    second = torch.tensor([[35.0, 0.0, 35.0, 70.0, 0.0, 100.0]], dtype=torch.float64)
    y, x = token_positions(relative_parameters(first, second), GRID)
    torch.testing.assert_close(y.view(GRID, GRID)[:, 0], 3.25 + 0.5 * torch.arange(GRID).double())
    torch.testing.assert_close(x.view(GRID, GRID)[0], torch.arange(GRID).double())
    tail = relative_embedding(relative_parameters(first, second), GRID, 32)[0, :, 32:]
    assert (tail == tail[:1]).all(), "the scale is the same for every token"
    value = 10 * np.log(0.5)
    expected = [np.sin(value / 10000 ** (k / 8)) for k in range(8)] + [
        np.cos(value / 10000 ** (k / 8)) for k in range(8)
    ]
    np.testing.assert_allclose(tail[0, :16].numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(tail[0, 16:24].numpy(), np.zeros(8), atol=1e-12)  # log 1: sines of 0

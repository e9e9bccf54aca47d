"""Which pixels the encoder sees."""

import pytest
import torch

from data_pipeline.errors import UserError
from pretrain.objectives.keys import StepKeys, beta_draws, sample_keys
from pretrain.objectives.mixing import cell_size, draw_cells, mix, pairing, partners
from pretrain.objectives.mixup import mix_pairs

CPU = torch.device("cpu")


@pytest.mark.parametrize(("size", "cell", "hidden"), [(224, 32, 24), (128, 32, 8), (64, 16, 8), (48, 16, 4)])
def test_exactly_floor_of_half_the_cells_are_hidden_in_whole_cells(size, cell, hidden):
    assert cell_size(size, None if size != 48 else 16) == cell
    for step in range(20):
        cells = draw_cells(StepKeys(1, step), size, cell, 0.5, CPU)
        grid = cells.pixels.unflatten(0, (size // cell, cell)).unflatten(2, (size // cell, cell))
        grid = grid.permute(0, 2, 1, 3).flatten(2)
        assert (grid.all(-1) | ~grid.any(-1)).all(), "a cell is hidden whole or not at all"
        assert grid.all(-1).sum() == hidden
        tokens = cells.pixels[::16, ::16].flatten()
        assert torch.equal(tokens.nonzero()[:, 0], cells.hidden)
        assert torch.equal((~tokens).nonzero()[:, 0], cells.visible)


def test_the_mask_is_a_function_of_seed_and_step_and_covers_every_cell_in_time():
    def pixels(seed, step, micro=0):
        return draw_cells(StepKeys(seed, step, micro), 224, 32, 0.5, CPU).pixels

    assert torch.equal(pixels(1, 2), pixels(1, 2, micro=1))
    assert not torch.equal(pixels(1, 2), pixels(1, 3))
    assert not torch.equal(pixels(1, 2), pixels(2, 2))
    share = torch.stack([pixels(0, step) for step in range(2000)]).float().mean(0)
    assert (share - 24 / 49).abs().max() < 0.06  # five standard deviations


def test_hidden_pixels_have_no_influence():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randint(0, 256, (2, 4, 64, 64, 3), dtype=torch.uint8, generator=generator)
    cells = draw_cells(StepKeys(0, 0), 64, 16, 0.5, CPU)
    x = mix(first, second, cells)
    hidden = cells.pixels[None, :, :, None].expand_as(first)
    assert torch.equal(mix(torch.where(hidden, 255 - first, first), second, cells), x)
    assert torch.equal(mix(first, torch.where(hidden, second, 255 - second), cells), x)
    assert torch.equal(x[hidden], second[hidden]) and torch.equal(x[~hidden], first[~hidden])


def test_pairs_are_neighbours_and_an_odd_batch_is_refused():
    assert pairing(6, CPU).tolist() == [1, 0, 3, 2, 5, 4]
    with pytest.raises(UserError, match=r"micro-batch of 5 is odd.*batch_size"):
        pairing(5, CPU)


def test_a_share_of_the_pairs_is_left_whole_by_seed_step_and_global_position():
    def owners(start, stop, probability=0.3, step=3):
        return partners(torch.arange(start, stop), StepKeys(7, step), probability) + start

    of_all, alone = owners(0, 4000), torch.arange(4000)
    whole = of_all == alone
    assert torch.equal(of_all, torch.where(whole, alone, alone ^ 1)), "neighbours, or oneself"
    assert torch.equal(whole[::2], whole[1::2]), "a pair is mixed or left whole together"
    assert 0.66 < whole.float().mean() < 0.74  # three standard deviations
    assert torch.equal(torch.cat([owners(0, 1000), owners(1000, 4000)]), of_all), "however the ranks share the batch"
    assert not torch.equal(owners(0, 4000, step=4), of_all)
    assert torch.equal(owners(0, 4000, probability=1.0), alone ^ 1) and torch.equal(owners(0, 4000, 0.0), alone)
    with pytest.raises(UserError, match="odd"):
        partners(torch.arange(5), StepKeys(7, 3), 0.3)


@pytest.mark.parametrize(("size", "cell"), [(224, 24), (224, 8), (100, None), (200, 32)])
def test_cells_that_do_not_tile_the_image_are_refused(size, cell):
    with pytest.raises(UserError, match=r"task\.mask_cell"):
        cell_size(size, cell)


def test_mixup_and_cutmix_are_fixed_by_the_pair_and_state_the_share_they_made():
    images = torch.zeros(400, 1, 20, 30)
    images[1::2] = 1.0
    keys = sample_keys(StepKeys(7, 3), torch.arange(400))
    mixed, share = mix_pairs(images, keys, 0.8, 1.0)
    again, _ = mix_pairs(images[100:], keys[100:], 0.8, 1.0)
    assert torch.equal(mixed[100:], again), "what another rank's rows are does not matter"
    own = torch.where(torch.arange(400) % 2 == 1, mixed.mean((1, 2, 3)), 1 - mixed.mean((1, 2, 3)))
    torch.testing.assert_close(own, share, atol=1e-6, rtol=0)
    assert torch.equal(share[::2], share[1::2])
    box = ((mixed == 0) | (mixed == 1)).flatten(1).all(1)
    assert 0.3 < box.float().mean() < 0.7
    blended = mixed[~box].flatten(1)
    assert (blended == blended[:, :1]).all()


def test_cutmix_boxes_are_rectangles_of_the_drawn_area():
    images = torch.zeros(2000, 1, 32, 32)
    images[1::2] = 1.0
    mixed, _ = mix_pairs(images, sample_keys(StepKeys(0, 0), torch.arange(2000)), 0.0, 1.0)
    for box in mixed[:200:2, 0].bool():
        rows, columns = box.any(1), box.any(0)
        assert torch.equal(box, rows[:, None] & columns[None]), "an outer product is a rectangle"
        for side in (rows, columns):
            assert (side.int().diff().abs().sum()) <= 2


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0, 2.0])
def test_beta_draws_follow_the_beta_distribution(alpha):
    draws = beta_draws(torch.arange(20000) * 7919, alpha).double()
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(draws.mean() - 0.5) < 5 * (variance / 20000) ** 0.5
    assert abs(draws.var() / variance - 1) < 0.05
    assert draws.min() >= 0 and draws.max() <= 1

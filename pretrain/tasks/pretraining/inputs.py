"""What the encoder is given of a batch: one view, a view with cells hidden, two images mixed, or both views."""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from data_pipeline.reading.batch import Batch
from data_pipeline.reading.targets import Targets
from pretrain.objectives.keys import StepKeys, sample_keys, second_view_keys
from pretrain.objectives.mixing import TOKEN, Cells, draw_cells, draw_sample_cells, mix, pair_keys, partners
from pretrain.tasks.pretraining.recipes import Recipe

if TYPE_CHECKING:
    from pretrain.tasks.pretraining.task import Pretraining


class Source(NamedTuple):
    """The tokens of the fused map that belong to one image of each row: int64 [n], or [B, n] where each row has its
    own mask. owner: int64 [B], that image's row; an involution.
    """

    tokens: Tensor
    owner: Tensor


class Seen(NamedTuple):
    """pixels: [R, S, S, 3], R = B, or 2 B where both views are rows of their own (all first views before all second).
    keys: int64 [R], of every row's random draws. whole: bool [B], rows whose image was left unmixed.
    """

    pixels: Tensor
    keys: Tensor
    cells: Cells
    sources: list[Source]
    whole: Tensor


def seen_by_the_encoder(recipe: Recipe, task: "Pretraining", batch: Batch[Targets], keys: StepKeys, cell: int) -> Seen:
    """cell: side of a mixing cell in pixels, where there are any."""
    first, own_keys = batch.views[:, recipe.view], sample_keys(keys, batch.positions)
    size, rows, device = first.shape[1], len(batch.positions), first.device
    own, every = torch.arange(rows, device=device), torch.arange((size // TOKEN) ** 2, device=device)
    whole = torch.ones(rows, dtype=torch.bool, device=device)
    cells = Cells(torch.empty(0), every, every[:0])
    if recipe.both_views:
        both = torch.cat([batch.views[:, 0], batch.views[:, 1]])
        return Seen(both, torch.cat([own_keys, second_view_keys(own_keys)]), cells, [Source(every, own)], whole)
    if recipe.image == "view":
        return Seen(first, own_keys, cells, [Source(every, own)], whole)
    if task.mask == "batch":
        cells = draw_cells(keys, size, cell, task.mask_ratio, device)
    else:
        drawn_from = pair_keys(own_keys) if recipe.image == "mixed" else own_keys
        cells = draw_sample_cells(drawn_from, size, cell, task.mask_ratio)
    if recipe.image == "masked":
        return Seen(first, own_keys, cells, [Source(cells.visible, own)], whole)
    pi = partners(batch.positions, keys, task.mix_probability)
    sources = [Source(cells.visible, own), Source(cells.hidden, pi)]
    return Seen(mix(first, first[pi], cells), own_keys, cells, sources, pi == own)

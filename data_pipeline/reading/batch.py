"""A batch: one rank's share of a micro-batch, as uint8, to be normalised on the device."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, NamedTuple, Self

import torch
from torch import Tensor

from data_pipeline.reading.targets import T


class SampleRef(NamedTuple):
    """The sample of a row. `row` counts the packed samples of the shard."""

    source: str
    shard: str
    key: str
    row: int = -1


@dataclass(frozen=True)
class Batch(Generic[T]):
    """B samples of V views of S x S pixels and their targets, on the CPU until `to`.

    `crops` are (top, left, height, width, flip, source width) in pixels of the source image, measured after the whole
    image was flipped where `flip` is 1 (the convention of SiameseIM's relative positions).
    """

    step: int
    micro: int
    positions: Tensor  # int64 [B] global positions
    views: Tensor  # uint8 [B, V, S, S, 3]
    crops: Tensor  # float32 [B, V, 6]
    targets: T
    samples: tuple[SampleRef, ...] = ()

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The batch with every tensor replaced by `change` of it."""
        return replace(
            self,
            positions=change(self.positions),
            views=change(self.views),
            crops=change(self.crops),
            targets=self.targets.map_tensors(change),
        )

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Self:
        """The batch on `device`; the copy is asynchronous where the batch is pinned."""
        return self.map_tensors(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin(self) -> Self:
        """The batch in page-locked memory."""
        return self.map_tensors(lambda tensor: tensor.pin_memory())

    def __len__(self) -> int:
        return self.positions.shape[0]


def normalize(views: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 [B, S, S, 3] -> dtype [B, 3, S, S] (channels last in memory), (x / 255 - mean) / std per channel.

    The arithmetic is fp32 whatever `dtype` is; runs wherever `views` is.
    """
    scale, shift = _constants(tuple(mean), tuple(std), views.shape[2], views.device)
    rows = views.flatten(2)  # rows of 3 S values vectorise, single pixels do not
    out = torch.empty(rows.shape, dtype=dtype, device=views.device)
    # A CPU takes image by image: the floats between the two steps then stay in its cache.
    part = 1 if views.device.type == "cpu" else max(1, len(rows))
    for source, target in zip(rows.split(part), out.split(part), strict=True):
        torch.addcmul(shift, source.float(), scale, out=target)
    return out.view(views.shape).permute(0, 3, 1, 2)


@functools.lru_cache(maxsize=32)
def _constants(
    mean: tuple[float, ...], std: tuple[float, ...], width: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Returns factor and summand of a row of `width` pixels. Cached, since a new tensor waits for the device."""
    scale = [1 / (255 * s) for s in std] * width
    shift = [-m / s for m, s in zip(mean, std, strict=True)] * width
    make = functools.partial(torch.tensor, dtype=torch.float32, device=device)
    return make(scale), make(shift)

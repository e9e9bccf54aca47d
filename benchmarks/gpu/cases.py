"""The operator's calls that are measured: the stages of InternImage at 224 px, with inputs that rotate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

MODELS = {"T": (4, 16, 64), "H": (10, 32, 32)}  # the first stage's groups, channels of a group, batch
POINTS = 9
# Of the offsets, in pixels. A fresh model's are 0, which is unrealistically kind to caches.
SPREAD = 1.5
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Inputs(NamedTuple):
    """Of one call: [N, H, W, ...], channels last; `gradient` is the output's.

    `packed` is offset, mask and a centre's logits in one tensor, as the layer's product gives them.
    """

    value: torch.Tensor
    offset: torch.Tensor
    mask: torch.Tensor
    gradient: torch.Tensor
    packed: torch.Tensor


@dataclass(frozen=True)
class Case:
    """A stage (1 to 4) of a model on a batch of images of 224 px."""

    model: str
    stage: int
    dtype: str
    batch: int

    @property
    def size(self) -> int:
        return 56 >> (self.stage - 1)

    @property
    def groups(self) -> int:
        return MODELS[self.model][0] << (self.stage - 1)

    @property
    def group_channels(self) -> int:
        return MODELS[self.model][1]

    @property
    def geometry(self) -> tuple[int | float | bool, ...]:
        """What `torch.ops.dcnv3` takes after the tensors."""
        return (self.groups, 3, 3, 1, 1, 1, 1, 1, 1, 1.0, False, 0)

    @property
    def points(self) -> int:
        """Sampled in one pass."""
        return self.batch * self.size**2 * self.groups * POINTS

    @property
    def places(self) -> int:
        """Numbers of a pixel's row in the packed tensor, a whole 8."""
        return -(-self.groups * (3 * POINTS + 1) // 8) * 8

    def bytes_moved(self) -> dict[str, int]:
        """The least bytes of each pass: every input read and every output written once."""
        element = DTYPES[self.dtype].itemsize
        pixels = self.batch * self.size**2 * self.groups * element
        inputs, output = pixels * (self.group_channels + 3 * POINTS), pixels * self.group_channels
        packed = output + self.batch * self.size**2 * self.places * element
        found = {"forward": inputs + output, "backward": 2 * inputs + output}
        return found | {"packed forward": packed + output, "packed backward": 2 * packed + output}

    def inputs(self, device: torch.device, spread: float = SPREAD) -> Inputs:
        points = self.groups * POINTS
        widths = (self.groups * self.group_channels, 2 * points, points, self.places - 3 * points)
        value, offset, mask, rest = (
            torch.randn(self.batch, self.size, self.size, width, device=device).to(DTYPES[self.dtype])
            for width in widths
        )
        offset = offset * spread
        return Inputs(value, offset, mask, torch.randn_like(value), torch.cat([offset, mask, rest], -1))

    def rotation(self, device: torch.device, spread: float = SPREAD, enough: int = 160_000_000) -> list[Inputs]:
        """As many inputs as are more than a cache of 50 MB holds; one on a CPU."""
        count = 1 if device.type != "cuda" else min(16, -(-enough // self.bytes_moved()["forward"]))
        return [self.inputs(device, spread) for _ in range(count)]

    def about(self) -> dict[str, int | str]:
        return {
            "model": self.model,
            "stage": self.stage,
            "dtype": self.dtype,
            "batch": self.batch,
            "map": self.size,
            "groups": self.groups,
            "group_channels": self.group_channels,
        }


def stages(dtype: str) -> list[Case]:
    """Every stage of T and H, those that take the most time of a model first."""
    order = [("T", 1), ("H", 3), ("T", 3), ("H", 1), ("T", 2), ("H", 2), ("T", 4), ("H", 4)]
    return [Case(model, stage, dtype, MODELS[model][2]) for model, stage in order]

"""The fp32 moving average of the weights, by fragments: a rank keeps its share, nothing is gathered.

One update an applied optimizer step, after it: `ema <- decay * ema + (1 - decay) * master`. In bf16 the update of a
decay of .9999 would round away, so the average never lives in less than fp32.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pretrain.training.fragments import Fragment


class Ema:
    """values[i] is the average of `fragments[i].master`; only trainable fragments have one."""

    def __init__(self, owned: Sequence[Fragment]) -> None:
        self.fragments = [fragment for fragment in owned if fragment.trainable]
        self.values: list[Tensor] = [fragment.master.clone() for fragment in self.fragments]
        self._masters = [fragment.master for fragment in self.fragments]

    @torch.no_grad()
    def update(self, decay: float) -> None:
        if self.values:
            torch._foreach_lerp_(self.values, self._masters, 1.0 - decay)

    @torch.no_grad()
    def reset(self) -> None:
        """Back to the weights themselves."""
        if self.values:
            torch._foreach_copy_(self.values, self._masters)

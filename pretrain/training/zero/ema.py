"""The fp32 exponential moving average (EMA) of the weights, by fragments: a rank keeps its share, nothing is gathered.

One update an applied optimizer step, after it: `ema <- decay * ema + (1 - decay) * master`. In bf16 the update of a
decay of .9999 would round away, so the EMA never lives in less than fp32.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from pretrain.training.zero.file_memory import zeros
from pretrain.training.zero.fragments import Fragment


class Ema:
    """values[i] is the EMA of `fragments[i].master`; only trainable fragments have one.

    folder: where the EMA lies in files (file_memory.py), if not in memory.
    """

    def __init__(self, owned: Sequence[Fragment], folder: Path | None = None) -> None:
        self.fragments = [fragment for fragment in owned if fragment.trainable]
        self._masters = [fragment.master for fragment in self.fragments]
        like = self._masters[0] if self._masters else torch.empty(0)
        flat = zeros((sum(master.numel() for master in self._masters),), like, folder)
        self.values: list[Tensor] = list(torch.split(flat, [master.numel() for master in self._masters]))
        self.reset()

    @torch.no_grad()
    def update(self, decay: float) -> None:
        if self.values:
            torch._foreach_lerp_(self.values, self._masters, 1.0 - decay)

    @torch.no_grad()
    def reset(self) -> None:
        """Back to the weights themselves."""
        if self.values:
            torch._foreach_copy_(self.values, self._masters)

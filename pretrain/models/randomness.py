"""Randomness that belongs to the sample, not to the process: what a layer draws is a pure function of (sample key,
layer).

    with drawing_from(keys):          # int64 [B], one a sample, made from (seed, step, global position)
        loss = model(images)...      # every DropPath draws hash(key, its own salt)

A run then does not depend on the number of ranks, and a recomputed forward sees what the first one saw. Outside the
context layers draw from torch's generator as usual.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from data_pipeline.hashing import GOLDEN, mix_tensor, shift_right, signed

_keys: Tensor | None = None


@contextmanager
def drawing_from(keys: Tensor) -> Iterator[None]:
    """Within the block, stochastic layers draw from `keys` (int64 [B], B the batch that the model is given). Blocks
    nest.
    """
    global _keys
    if keys.dtype != torch.int64 or keys.ndim != 1:
        raise ValueError(f"sample keys are int64 [B], not {keys.dtype} {list(keys.shape)}")
    before, _keys = _keys, keys
    try:
        yield
    finally:
        _keys = before


def hashed_uniform(keys: Tensor, salt: int) -> Tensor:
    """float32 [B] in [0, 1), fixed by (key, salt): the upper 24 bits of splitmix64's finalizer, twice applied.

    keys: int64 [B]. The same bits on every device: int64 arithmetic wraps around everywhere.
    """
    z = mix_tensor(mix_tensor(keys + signed(GOLDEN)) + signed((salt + 1) * 0xD1B54A32D192ED03))
    return shift_right(z, 40).to(torch.float32) * 2.0**-24


def uniform(batch: int, salt: int, device: torch.device) -> Tensor:
    """float32 [batch] in [0, 1): hashed from the keys of the enclosing `drawing_from`, or drawn from torch's generator.

    Raises ValueError where the keys are not one a sample.
    """
    if _keys is None:
        return torch.rand(batch, device=device)
    if _keys.shape[0] != batch:
        raise ValueError(f"drawing_from holds {_keys.shape[0]} keys, but the model was given a batch of {batch}")
    return hashed_uniform(_keys.to(device), salt)

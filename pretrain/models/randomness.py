"""Randomness that belongs to the sample, not to the process: what a layer draws is a pure function of (sample key,
layer).

    with drawing_from(keys):         # int64 [B], one a sample, made from (seed, step, global position)
        loss = model(images)...      # every DropPath's factors come from hash(key, its own salt)

A run then does not depend on the number of ranks, and a recomputed forward sees what the first one saw. Outside the
context layers draw from torch's generator as usual.
"""

from collections.abc import Iterator, Sequence
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
    return _unit_interval(mix_tensor(_of_key(keys) + _of_salt(salt)))


def uniforms(batch: int, salts: Sequence[int], device: torch.device) -> Tensor:
    """float32 [len(salts), batch] in [0, 1): row i is `hashed_uniform(keys, salts[i])` for the keys of the enclosing
    `drawing_from`, or all are drawn from torch's generator.

    All rows take one launch of each operation. Raises ValueError where the keys are not one a sample.
    """
    if _keys is None:
        return torch.rand(len(salts), batch, device=device)
    if _keys.shape[0] != batch:
        raise ValueError(f"drawing_from holds {_keys.shape[0]} keys, but the model was given a batch of {batch}")
    constants = on_device(torch.tensor([_of_salt(salt) for salt in salts]), device)
    return _unit_interval(mix_tensor(_of_key(_keys.to(device)) + constants[:, None]))


def uniforms_of(row: int, places: Tensor, salt: int) -> Tensor:
    """float32 [n] in [0, 1) of sample `row` of the batch whose keys the enclosing `drawing_from` holds, fixed by
    (key, salt, place); without one, from torch's generator. places: int64 [n].
    """
    if _keys is None:
        return torch.rand(len(places), device=places.device)
    stream = mix_tensor(_keys[row].to(places.device) + _of_salt(salt))
    return hashed_uniform(stream + places, salt)


@contextmanager
def drawing_as(row: int, salt: int, device: torch.device) -> Iterator[None]:
    """Within the block, torch's own generators of the CPU and of `device` give what belongs to sample `row` of the
    batch whose keys the enclosing `drawing_from` holds; they are put back. For draws inside other libraries; it waits
    for the device. Without an enclosing one, nothing is changed.
    """
    if _keys is None:
        yield
        return
    seed = int(mix_tensor(_of_key(_keys[row]) + _of_salt(salt)))
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def on_device(values: Tensor, device: torch.device) -> Tensor:
    """A small tensor of the CPU on `device`, without waiting for what the device still has to do."""
    if device.type != "cuda" or torch.compiler.is_compiling():
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def _of_key(keys: Tensor) -> Tensor:
    return mix_tensor(keys + signed(GOLDEN))


def _of_salt(salt: int) -> int:
    return signed((salt + 1) * 0xD1B54A32D192ED03)


def _unit_interval(z: Tensor) -> Tensor:
    return shift_right(z, 40).to(torch.float32) * 2.0**-24

"""Everything random in a step is a function of (seed, step, global position), so that a run does not depend on the
number of ranks.

`sample_keys` turns the three into one int64 a sample; `pretrain.models.randomness` hashes it, for drop path and for
the draws below.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from data_pipeline.hashing import GOLDEN, signed
from pretrain.models.randomness import hashed_uniform

# Salts of the draws made here. Layers of the models take small numbers; these stay clear of them.
SALT_MASK = 1 << 20
SALT_MIX_CHOICE = SALT_MASK + 1
SALT_MIX_BOX_Y = SALT_MASK + 2
SALT_MIX_BOX_X = SALT_MASK + 3
SALT_MIX_PAIR = SALT_MASK + 5
SALT_SAMPLE_MASK = SALT_MASK + 6
SALT_BETA = SALT_MASK + 64


class StepKeys(NamedTuple):
    """What a micro-batch's randomness is derived from, together with `batch.positions`.

    seed: of the run. step: optimizer step. micro: index of the micro-batch inside the step.
    """

    seed: int
    step: int
    micro: int = 0


def sample_keys(keys: StepKeys, positions: Tensor) -> Tensor:
    """int64 [B]: one key a sample from (seed, step, global position). positions: int64 [B]."""
    # Odd constants, far apart, modulo 2^64: distinct triples give distinct keys, and the hash does the rest.
    return positions * signed(GOLDEN) + _step_constant(keys)


def second_view_keys(keys: Tensor) -> Tensor:
    """The keys of the samples' other view, for an encoder that sees both views as rows of their own."""
    return keys + signed(0xD6E8FEB86659FD93)


def step_uniform(keys: StepKeys, count: int, salt: int) -> Tensor:
    """float32 [count] in [0, 1) on the CPU, the same on every rank and in every micro-batch of a step."""
    return hashed_uniform(torch.arange(count) + _step_constant(keys), salt)


def beta_draws(keys: Tensor, alpha: float) -> Tensor:
    """float32 [B] from Beta(alpha, alpha), fixed by the key: Joehnk's rejection, 64 tries at once (a miss, rarer than
    1e-5 for alpha up to 2, gives 1/2).
    """
    if alpha == 1.0:
        return hashed_uniform(keys, SALT_BETA)
    tries = [(hashed_uniform(keys, SALT_BETA + 2 * i), hashed_uniform(keys, SALT_BETA + 2 * i + 1)) for i in range(64)]
    u = torch.stack([t[0] for t in tries]).double().clamp_min(1e-12) ** (1 / alpha)
    v = torch.stack([t[1] for t in tries]).double().clamp_min(1e-12) ** (1 / alpha)
    accepted = u + v <= 1
    first = accepted.int().argmax(0, keepdim=True)
    ratio = (u / (u + v)).gather(0, first)[0]
    return torch.where(accepted.any(0), ratio, torch.full_like(ratio, 0.5)).float()


def _step_constant(keys: StepKeys) -> int:
    return signed(keys.step * 0xBF58476D1CE4E5B9 + keys.seed * 0x94D049BB133111EB)

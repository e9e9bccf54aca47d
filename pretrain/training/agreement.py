"""What the ranks agree on in a step: one small sum, begun after the last forward pass and read before the update.

    forward -> begin -> backward (the sum is under way) -> read -> decide -> update -> save? -> stop?

Seven numbers a rank, whatever the number of ranks. On GPUs they travel on the device, in a group of their own beside
the gradients, and nothing waits for the host between forward and backward.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.training.distributed import DistributedContext


@dataclass(frozen=True)
class Said:
    """One rank's part. stop: it was asked to stop. due: it wants a checkpoint after this step. seen, bad: its samples.
    written, failed: its part of the save under way is done, and was not possible.
    """

    stop: bool
    due: bool
    seen: float
    bad: float
    written: bool
    failed: bool


@dataclass(frozen=True)
class Agreed:
    """Over all ranks: the mean loss, whether any asked to stop or wants a checkpoint, sums of samples, whether all have
    written, whether any failed to.
    """

    loss: float
    stop: bool
    due: bool
    seen: float
    bad: float
    written: bool
    failed: bool


def begin_agreement(context: DistributedContext, loss: Tensor, said: Said) -> Callable[[], Agreed]:
    """Start the sum; what is returned waits for it. loss: this rank's, 0-d, on the device. Collective."""
    flags = [said.stop, said.due, said.seen, said.bad, said.written, said.failed]
    numbers = torch.tensor([float(flag) for flag in flags], dtype=torch.float64)
    if loss.device.type == "cuda":
        numbers = numbers.pin_memory().to(loss.device, non_blocking=True)
    wait = context.begin_sum(torch.cat([loss.detach().double().view(1), numbers]))

    def read() -> Agreed:
        total, stop, due, seen, bad, written, failed = wait()
        ranks = context.world_size
        return Agreed(total / ranks, stop > 0, due > 0, seen, bad, written == ranks, failed > 0)

    return read

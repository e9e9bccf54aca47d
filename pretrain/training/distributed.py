"""Where this process stands among the others, and the small talk between them.

The tensors of the model go over NCCL on GPUs and gloo on CPUs, by DeepSpeed's hand. What the ranks agree on at a step
boundary (stop requests, losses, finished checkpoint writes) goes over a gloo group of its own: a few CPU numbers, no
device synchronisation.
"""

import datetime
import os
import random
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypeVar

import numpy
import torch
import torch.distributed as dist

from data_pipeline.errors import UserError

V = TypeVar("V")


@dataclass(frozen=True)
class DistributedContext:
    """The rank, the number of ranks, the device, and the gloo group for small talk (None where there is one rank)."""

    rank: int
    world_size: int
    device: torch.device
    group: dist.ProcessGroup | None

    @property
    def leader(self) -> bool:
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sum over ranks; equal on every rank."""
        if self.world_size == 1 or not values:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self.group)
        result: list[float] = tensor.tolist()
        return result

    def gather(self, value: V) -> list[V]:
        """One small picklable object a rank, in rank order, from our own processes only."""
        everything = [value] * self.world_size
        if self.world_size == 1:
            return everything
        dist.all_gather_object(everything, value, group=self.group)
        return everything

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier(group=self.group)


def leave(code: int) -> NoReturn:
    """End a process that was one rank, and nothing else, with `code`.

    At once: while the interpreter winds down, a late signal or a thread of a communication library that still runs
    (`terminate called without an active exception`) would turn a good exit code into a bad one.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def join(timeout_seconds: float) -> DistributedContext:
    """Read RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT (absent: a single process) and meet the others.

    timeout_seconds: of a collective; slightly above the hang limit, so that the watchdog speaks first. Raises UserError
    where this machine has GPUs, but fewer than ranks.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        if local_rank >= (there := torch.cuda.device_count()):
            raise UserError(
                f"rank {local_rank} of this machine has no GPU: {there} visible. Start {there} processes, or hide the "
                "GPUs (CUDA_VISIBLE_DEVICES=) to train on the CPU"
            )
        torch.cuda.set_device(device)
    timeout = datetime.timedelta(seconds=timeout_seconds)
    if not dist.is_initialized():
        backend = "nccl" if cuda else "gloo"
        if world_size == 1:
            # A file to meet at needs no port; DeepSpeed reads the variables all the same.
            for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
                os.environ.setdefault(name, value)
            place = Path(tempfile.mkdtemp(prefix="internimage-")) / "meet"
            dist.init_process_group(backend, init_method=f"file://{place}", rank=0, world_size=1, timeout=timeout)
        else:
            dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=timeout)
    group = dist.new_group(backend="gloo", timeout=timeout) if world_size > 1 else None
    assert group is None or isinstance(group, dist.ProcessGroup), "this rank is a member of a group of all ranks"
    return DistributedContext(rank, world_size, device, group)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Every generator as a function of (seed, step, rank): a resumed run draws what the unbroken one drew, nothing
    is saved.
    """
    value = ((seed * 1_000_003 + step) * 65_537 + rank) % (2**63)
    torch.manual_seed(value)
    random.seed(value)
    numpy.random.seed(value % (2**32))

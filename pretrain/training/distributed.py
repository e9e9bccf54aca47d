"""Where this process stands among the others, and the small talk between them.

The tensors of the model go over NCCL on GPUs and gloo on CPUs, by DeepSpeed's hand. What the ranks agree on in each
step goes over a group of its own on the device (`agreement.py`); what is rare (start, logs, checkpoints, the end) over
a gloo group, on the host.
"""

import contextlib
import datetime
import os
import random
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn, TypeVar

import numpy
import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.errors import UserError
from pretrain.training.interfaces import name_interfaces

V = TypeVar("V")
# In messages of gloo, whose errors have no type of their own, and of NCCL.
_LOST_PARTNER = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "ncclRemoteError")


@dataclass(frozen=True)
class DistributedContext:
    """The rank, the number of ranks, the device; the gloo group for small talk, and the group of the device for what
    each step agrees on (None where there is one rank).
    """

    rank: int
    world_size: int
    device: torch.device
    group: dist.ProcessGroup | None
    device_group: dist.ProcessGroup | None = None

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

    def begin_sum(self, values: Tensor) -> Callable[[], list[float]]:
        """Start a sum over ranks of `values`, float64 [n] on the device; what is returned waits for it."""
        if self.world_size == 1:
            return values.tolist
        work = dist.all_reduce(values, group=self.device_group or self.group, async_op=True)

        def wait() -> list[float]:
            if work is not None:
                work.wait()
            result: list[float] = values.tolist()
            return result

        return wait

    def from_leader(self, make: Callable[[], V]) -> V:
        """What `make()` gives on the leader, on every rank. For whatever is read from a file system: two ranks may see
        different states of it. An exception of `make` is raised on every rank. Collective.
        """
        found: list[tuple[V | None, Exception | None]] = [(None, None)]
        if self.leader:
            try:
                found = [(make(), None)]
            except Exception as problem:  # the others wait for an answer, whatever it is
                found = [(None, problem)]
        if self.world_size > 1:
            dist.broadcast_object_list(found, src=0, group=self.group)
        value, error = found[0]
        if error is not None:
            raise error
        return value  # type: ignore[return-value]

    def gather(self, value: V) -> list[V]:
        """One small picklable object a rank, in rank order, from our own processes only."""
        everything = [value] * self.world_size
        if self.world_size == 1:
            return everything
        dist.all_gather_object(everything, value, group=self.group)
        return everything

    def say(self, key: str, text: str) -> None:
        """Tell whoever asks by `heard`. Not collective, and good in any thread: it goes by the store, not the group."""
        _store().set(key, text)

    def heard(self, keys: Sequence[str]) -> list[str] | None:
        """What other ranks have said under `keys`, and forget it; None until all of them have. Waits for nothing."""
        if not keys:
            return []
        store = _store()
        if not store.check(list(keys)):
            return None
        said = [store.get(key).decode() for key in keys]
        for key in keys:
            store.delete_key(key)
        return said

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier(group=self.group)


def _store() -> dist.Store:
    """What the ranks met by: a small key-value service, the leader's where no other launcher brings one."""
    return dist.distributed_c10d._get_default_store()


def lost_a_partner(error: BaseException) -> bool:
    """Did a connection to another rank break, so that this rank is not the one at fault?"""
    text = str(error)
    return isinstance(error, dist.DistError) or any(sign in text for sign in _LOST_PARTNER)


def leave(code: int) -> NoReturn:
    """End a process that was one rank, and nothing else, with `code`.

    At once: while the interpreter winds down, a late signal or a thread of a communication library that still runs
    (`terminate called without an active exception`) would turn a good exit code into a bad one.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # whoever read it has left: no reason to end otherwise
            stream.flush()
    os._exit(code)


def join(timeout_seconds: float) -> DistributedContext:
    """Read RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT (absent: a single process) and meet the others.

    timeout_seconds: of a collective; slightly above the hang limit, so that the watchdog speaks first. Raises UserError
    where this machine has GPUs, but fewer than ranks.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    cuda = torch.cuda.is_available()
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", device_number(local_rank, torch.cuda.device_count()))
        torch.cuda.set_device(device)
    name_interfaces(os.environ)
    if cuda:
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # entries of NCCL's flight recorder (watchdog.py)
    timeout = datetime.timedelta(seconds=timeout_seconds)
    if world_size == 1:  # DeepSpeed reads the variables all the same
        for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
            os.environ.setdefault(name, value)
    if not dist.is_initialized():
        backend = "nccl" if cuda else "gloo"
        if world_size == 1:  # a store in memory needs neither a port nor a file
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        else:
            dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=timeout)
    group = dist.new_group(backend="gloo", timeout=timeout) if world_size > 1 else None
    assert group is None or isinstance(group, dist.ProcessGroup), "this rank is a member of a group of all ranks"
    beside = dist.new_group(backend="nccl", timeout=timeout) if cuda and world_size > 1 else group
    assert beside is None or isinstance(beside, dist.ProcessGroup)
    context = DistributedContext(rank, world_size, device, group, beside)
    if cuda:
        identity = str(torch.cuda.get_device_properties(device).uuid)
        check_devices(context.gather((socket.gethostname(), identity)))
    return context


def device_number(local_rank: int, visible: int) -> int:
    """Which of the `visible` GPUs a rank takes. A task that Slurm shows one GPU alone (--gpus-per-task) takes that one;
    `check_devices` sees, when the ranks have met, that no two share it. Raises UserError where there are too few.
    """
    if visible == 1:
        return 0
    if local_rank >= visible:
        raise UserError(
            f"rank {local_rank} of this machine has no GPU: {visible} visible. Start {visible} processes, or hide the "
            "GPUs (CUDA_VISIBLE_DEVICES=) to train on the CPU"
        )
    return local_rank


def check_devices(places: Sequence[tuple[str, str]]) -> None:
    """places: (host, identity of its GPU) of every rank. Raises UserError where two ranks have the same one."""
    taken: dict[tuple[str, str], int] = {}
    for rank, place in enumerate(places):
        if place in taken:
            raise UserError(
                f"ranks {taken[place]} and {rank} have the same GPU of {place[0]}: start one process a GPU, or have "
                "Slurm give each task its own (launch slurm --gpus-per-rank 1)"
            )
        taken[place] = rank


def seed_step(seed: int, step: int, rank: int) -> None:
    """Every generator as a function of (seed, step, rank): a resumed run draws what the unbroken one drew, nothing
    is saved.
    """
    value = ((seed * 1_000_003 + step) * 65_537 + rank) % (2**63)
    torch.manual_seed(value)
    random.seed(value)
    numpy.random.seed(value % (2**32))

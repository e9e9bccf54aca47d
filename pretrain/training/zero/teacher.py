"""The teacher: the part of the task's module that has an EMA, in the compute dtype, filled from the fp32 EMA.

    masters (fp32, this rank's fragments)
       | Ema.update: lerp
    EMA (fp32, the same fragments)
       | refresh: cast; stages 0 to 2 gather in chunks into a whole copy on every rank,
       |          at stage 3 each rank fills its own partition and nothing is sent
    teacher

Buffers (batch statistics) are copied from the task's module, and have no EMA.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.training.distributed import DistributedContext
from pretrain.training.zero.ema import Ema
from pretrain.training.zero.engine import Engine, gather_by_region, import_deepspeed
from pretrain.training.zero.partition import partition, partitions

CHUNK = 8_388_608  # values a rank sends at once


def build_teacher(
    module: nn.Module, names: Sequence[str], engine: Engine, ema: Ema, context: DistributedContext
) -> "WholeTeacher | PartitionedTeacher":
    """module: what the task's `teacher()` made; its parameters are among `names`, those of the task that have an EMA.

    Raises ValueError where the EMA does not cover the module.
    """
    missing = sorted({name for name, _ in module.named_parameters()} - set(names))
    if missing:
        raise ValueError(f"the teacher has parameters without an EMA: {missing[:3]}")
    module.eval().requires_grad_(False)
    kind = PartitionedTeacher if partitions(engine.stage, context) else WholeTeacher
    return kind(module, engine, ema, context)


def _shared_buffers(module: nn.Module, task: nn.Module) -> list[tuple[Tensor, Tensor]]:
    theirs = dict(task.named_buffers())
    return [(buffer, theirs[name]) for name, buffer in module.named_buffers() if name in theirs]


class PartitionedTeacher:
    """Under ZeRO-3 the teacher is cut as the task is: equal shapes give equal cuts, so a rank's share of the EMA is its
    part of the teacher.

    module: on the meta device.
    """

    def __init__(self, module: nn.Module, engine: Engine, ema: Ema, context: DistributedContext) -> None:
        self.module, self.dtype = module, engine.compute_dtype
        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            # Nothing stays gathered between steps, for it would be stale after the next refresh.
            "zero_optimization": {
                "stage": 3,
                "stage3_param_persistence_threshold": 0,
                "stage3_max_reuse_distance": 0,
                "stage3_prefetch_bucket_size": engine.settings["zero_optimization"]["reduce_bucket_size"],
            },
        }
        if self.dtype == torch.bfloat16:
            settings["bf16"] = {"enabled": True}
        elif self.dtype == torch.float16:
            settings["fp16"] = {"enabled": True, "auto_cast": False}
        partition(module, settings, context, self.dtype)
        self._buffers = _shared_buffers(module, engine.module)
        self._wrapper, *_ = import_deepspeed().initialize(model=module, config=settings)
        if engine.compiled:
            gather_by_region(module)
        self._parameters: dict[str, Any] = dict(module.named_parameters())
        self._pairs: list[tuple[Tensor, Tensor]] = []
        rank = context.rank
        for fragment, value in zip(ema.fragments, ema.values, strict=True):
            parameter = self._parameters.get(fragment.name)
            if parameter is None:
                continue
            part = parameter.ds_tensor
            if fragment.start != rank * part.ds_numel or fragment.length > part.ds_numel:
                raise ValueError(f"the teacher's {fragment.name} is not cut as the task's is")
            self._pairs.append((part.data.view(-1).narrow(0, 0, fragment.length), value))

    @torch.no_grad()
    def refresh(self) -> None:
        for mine, theirs in self._buffers:
            mine.copy_(theirs)
        for parameter in self._parameters.values():
            if parameter.ds_status.name == "AVAILABLE":
                parameter.partition()
        torch._foreach_copy_([mine for mine, _ in self._pairs], [value for _, value in self._pairs])


class WholeTeacher:
    """A whole copy on every rank, gathered from the fragments wherever they lie."""

    def __init__(self, module: nn.Module, engine: Engine, ema: Ema, context: DistributedContext) -> None:
        self.module, self._context, self._dtype = module, context, engine.compute_dtype
        module.to(context.device)
        self._buffers = _shared_buffers(module, engine.module)
        own = dict(module.named_parameters())
        for parameter in own.values():
            parameter.data = parameter.data.to(self._dtype)
        mine = [i for i, fragment in enumerate(ema.fragments) if fragment.name in own]
        self._sources = [ema.values[i] for i in mine]
        layout = [(ema.fragments[i].name, ema.fragments[i].start, ema.fragments[i].length) for i in mine]
        layouts: list[list[tuple[str, int, int]]] = context.gather(layout)
        flat = {name: parameter.data.view(-1) for name, parameter in own.items()}
        covered = dict.fromkeys(flat, 0)
        self._targets: list[list[Tensor]] = []
        for pieces in layouts:
            self._targets.append([flat[name].narrow(0, start, length) for name, start, length in pieces])
            for name, _, length in pieces:
                covered[name] += length
        holes = sorted(name for name, count in covered.items() if count != flat[name].numel())
        if holes:
            raise ValueError(f"the teacher's parameters are not covered by the EMA: {holes[:3]}")
        longest = max((sum(t.numel() for t in targets) for targets in self._targets), default=0)
        self._spans = [(start, min(longest, start + CHUNK)) for start in range(0, longest, CHUNK)]

    @torch.no_grad()
    def refresh(self) -> None:
        for mine, theirs in self._buffers:
            mine.copy_(theirs)
        if self._context.world_size == 1:
            torch._foreach_copy_(self._targets[0], self._sources)
            return
        for start, end in self._spans:
            packed = torch.zeros(end - start, dtype=self._dtype, device=self._context.device)
            _pair(self._sources, packed, start, into_packed=True)
            gathered = torch.empty(self._context.world_size * (end - start), dtype=self._dtype, device=packed.device)
            dist.all_gather_into_tensor(gathered, packed)
            for rank, targets in enumerate(self._targets):
                _pair(targets, gathered.narrow(0, rank * (end - start), end - start), start, into_packed=False)


def _pair(pieces: Sequence[Tensor], packed: Tensor, offset: int, *, into_packed: bool) -> None:
    """Copy between `pieces`, laid end to end, and `packed`, which covers [offset, offset + len) of them."""
    position, end = 0, offset + packed.numel()
    sources, targets = [], []
    for piece in pieces:
        first, last = max(position, offset), min(position + piece.numel(), end)
        if first < last:
            outside = piece.narrow(0, first - position, last - first)
            inside = packed.narrow(0, first - offset, last - first)
            sources.append(outside if into_packed else inside)
            targets.append(inside if into_packed else outside)
        position += piece.numel()
    if sources:
        torch._foreach_copy_(targets, sources)

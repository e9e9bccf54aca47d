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
from torch import Tensor, nn

from pretrain.training.distributed import DistributedContext
from pretrain.training.zero.ema import Ema
from pretrain.training.zero.engine import Engine, gather_by_region, import_deepspeed
from pretrain.training.zero.gathered import Gathered, Piece, shared_buffers
from pretrain.training.zero.partition import partition, partitions


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
        self._buffers = shared_buffers(module, engine.module)
        self._wrapper, *_ = import_deepspeed().initialize(model=module, config=settings)
        if engine.compiled:
            gather_by_region(module)
        self._filled = torch.cuda.Event() if context.device.type == "cuda" else None
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
        if self._filled is not None:
            self._filled.record()

    def ready(self) -> None:
        """Wait until this rank's part is filled: DeepSpeed gathers on a stream of its own, which waits for no other."""
        if self._filled is not None:
            self._filled.synchronize()


class WholeTeacher:
    """A whole copy on every rank, gathered from the fragments wherever they lie (gathered.py).

    On a GPU a refresh runs on a stream of its own, beside whatever follows the step (logging, the next batch); `ready`
    has the next forward pass wait for it.
    """

    def __init__(self, module: nn.Module, engine: Engine, ema: Ema, context: DistributedContext) -> None:
        self.module, self._device = module, context.device
        module.to(context.device)
        self._buffers = shared_buffers(module, engine.module)
        own = dict(module.named_parameters())
        for parameter in own.values():
            parameter.data = parameter.data.to(engine.compute_dtype)
        pieces = [
            Piece(fragment.name, fragment.start, value)
            for fragment, value in zip(ema.fragments, ema.values, strict=True)
            if fragment.name in own
        ]
        self._whole = Gathered({name: parameter.data for name, parameter in own.items()}, pieces, context)
        self._stream = torch.cuda.Stream(context.device) if context.device.type == "cuda" else None

    @torch.no_grad()
    def refresh(self) -> None:
        """Begin to fill the teacher from the EMA; `ready` before it is used. Collective."""
        for mine, theirs in self._buffers:
            mine.copy_(theirs)
        if self._stream is None:
            self._whole.fill()
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            self._whole.fill()

    def ready(self) -> None:
        """Have what is enqueued from now on wait for the refresh."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

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
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.training.distributed import DistributedContext
from pretrain.training.zero.deepspeed_config import LARGEST_RECEIVED
from pretrain.training.zero.ema import Ema
from pretrain.training.zero.engine import Engine, gather_by_region, import_deepspeed
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

    def ready(self) -> None:
        """Nothing is under way: each rank has filled its own part."""


class WholeTeacher:
    """A whole copy on every rank, gathered from the fragments wherever they lie.

    The pieces are laid end to end in flat buffers whose layout never changes, so that a refresh is a few calls however
    many pieces there are: one cast into the send buffer, and for each chunk one all-gather and one copy. What is
    received at once is bounded over all ranks together. On a GPU this runs on a stream of its own, beside whatever
    follows the step (logging, the next batch); `ready` has the next forward pass wait for it.
    """

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
        targets: list[list[Tensor]] = []
        for pieces in layouts:
            targets.append([flat[name].narrow(0, start, length) for name, start, length in pieces])
            for name, _, length in pieces:
                covered[name] += length
        holes = sorted(name for name, count in covered.items() if count != flat[name].numel())
        if holes:
            raise ValueError(f"the teacher's parameters are not covered by the EMA: {holes[:3]}")
        self._stream = torch.cuda.Stream(context.device) if context.device.type == "cuda" else None
        self._chunks: list[_Chunk] = []
        self._packed: list[Tensor] = targets[0]  # where this rank's pieces go: with one rank the teacher itself
        if context.world_size > 1:
            self._lay_out(targets)

    def _lay_out(self, targets: Sequence[Sequence[Tensor]]) -> None:
        """The buffers, and what is copied between them and the pieces. targets: of every rank, in rank order."""
        ranks, device = self._context.world_size, self._context.device
        longest = max((sum(target.numel() for target in pieces) for pieces in targets), default=0)
        length = min(longest, max(1, LARGEST_RECEIVED // ranks))
        send = torch.zeros(longest, dtype=self._dtype, device=device)
        received = torch.empty(ranks * length, dtype=self._dtype, device=device)
        pairs = _overlaps(self._sources, send, 0)
        self._packed, self._sources = [inside for inside, _ in pairs], [piece for _, piece in pairs]
        for start in range(0, longest, length or 1):
            sent = send.narrow(0, start, min(length, longest - start))
            whole = received.narrow(0, 0, ranks * sent.numel())
            pairs = [
                pair
                for rank, pieces in enumerate(targets)
                for pair in _overlaps(pieces, whole.narrow(0, rank * sent.numel(), sent.numel()), start)
            ]
            self._chunks.append(_Chunk(sent, whole, [piece for _, piece in pairs], [inside for inside, _ in pairs]))

    @torch.no_grad()
    def refresh(self) -> None:
        """Begin to fill the teacher from the EMA; `ready` before it is used. Collective."""
        for mine, theirs in self._buffers:
            mine.copy_(theirs)
        if self._stream is None:
            self._fill()
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._context.device))
        with torch.cuda.stream(self._stream):
            self._fill()

    def _fill(self) -> None:
        if self._packed:
            torch._foreach_copy_(self._packed, self._sources)
        for chunk in self._chunks:
            dist.all_gather_into_tensor(chunk.received, chunk.sent, group=self._context.device_group)
            torch._foreach_copy_(chunk.pieces, chunk.inside)

    def ready(self) -> None:
        """Have what is enqueued from now on wait for the refresh."""
        if self._stream is not None:
            torch.cuda.current_stream(self._context.device).wait_stream(self._stream)


class _Chunk(NamedTuple):
    """One all-gather: what is sent and received, and the teacher's `pieces` with their places `inside` the latter."""

    sent: Tensor
    received: Tensor
    pieces: list[Tensor]
    inside: list[Tensor]


def _overlaps(pieces: Sequence[Tensor], buffer: Tensor, offset: int) -> list[tuple[Tensor, Tensor]]:
    """(part of `buffer`, part of a piece) wherever `pieces`, laid end to end, meet [offset, offset + len(buffer))."""
    position, end, found = 0, offset + buffer.numel(), []
    for piece in pieces:
        first, last = max(position, offset), min(position + piece.numel(), end)
        if first < last:
            found.append(
                (buffer.narrow(0, first - offset, last - first), piece.narrow(0, first - position, last - first))
            )
        position += piece.numel()
    return found

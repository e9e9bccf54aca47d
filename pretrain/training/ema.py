"""The fp32 moving average of the weights, by fragments, and the teacher that computes with it.

    masters (fp32, this rank's fragments) --lerp_--> EMA (fp32, the same fragments: a rank keeps its share, never gathered)
                                                        |  refresh: cast, gather in chunks (stage 3: no gather, each rank its slice)
                                                        v
                                                     teacher (compute dtype: the momentum-averaged part of the task)

One update an applied optimizer step, after it: `ema <- decay * ema + (1 - decay) * master`. In bf16 the update of a decay of
.9999 would round away; so the average never lives in less than fp32. Buffers (batch statistics) are copied, not averaged.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.training.fragments import Fragment
from pretrain.training.processes import Processes

CHUNK = 8_388_608  # values a rank sends at once


class Ema:
    """values[i] is the average of `fragments[i].master`; only trainable fragments have one."""

    def __init__(self, owned: Sequence[Fragment]) -> None:
        self.fragments = [fragment for fragment in owned if fragment.trainable]
        self.values: list[Tensor] = [fragment.master.clone() for fragment in self.fragments]
        self._masters = [fragment.master for fragment in self.fragments]

    @torch.no_grad()
    def update(self, decay: float) -> None:
        if self.values:
            torch._foreach_lerp_(self.values, self._masters, 1.0 - decay)

    @torch.no_grad()
    def reset(self) -> None:
        """Back to the weights themselves."""
        if self.values:
            torch._foreach_copy_(self.values, self._masters)


class Teacher:
    """Keeps `module` (whole on every rank) equal to the average. Built once all layouts are known; `refresh` is collective."""

    def __init__(
        self,
        module: nn.Module,
        names: Sequence[str],
        task: nn.Module,
        ema: Ema,
        processes: Processes,
        dtype: torch.dtype,
    ) -> None:
        self.module = module.to(device=processes.device)
        for parameter in self.module.parameters():
            parameter.requires_grad_(False)
            parameter.data = parameter.data.to(dtype)
        self.module.eval()
        self._processes, self._dtype = processes, dtype
        averaged = set(names)
        own = dict(self.module.named_parameters())
        missing = sorted(set(own) - averaged)
        if missing:
            raise ValueError(f"the teacher has parameters that are not averaged: {missing[:3]}")
        mine = [i for i, fragment in enumerate(ema.fragments) if fragment.name in own]
        self._sources = [ema.values[i] for i in mine]
        layout = [(ema.fragments[i].name, ema.fragments[i].start, ema.fragments[i].length) for i in mine]
        layouts: list[list[tuple[str, int, int]]] = processes.gather(layout)
        flat = {name: parameter.data.view(-1) for name, parameter in own.items()}
        covered = dict.fromkeys(flat, 0)
        self._targets: list[list[Tensor]] = []
        for pieces in layouts:
            self._targets.append([flat[name].narrow(0, start, length) for name, start, length in pieces])
            for name, _, length in pieces:
                covered[name] += length
        holes = sorted(name for name, count in covered.items() if count != flat[name].numel())
        if holes:
            raise ValueError(f"the teacher's parameters are not covered by the average: {holes[:3]}")
        task_buffers = dict(task.named_buffers())
        self._buffers = [(b, task_buffers[name]) for name, b in self.module.named_buffers() if name in task_buffers]
        longest = max((sum(t.numel() for t in targets) for targets in self._targets), default=0)
        self._spans = [(start, min(longest, start + CHUNK)) for start in range(0, longest, CHUNK)]

    @torch.no_grad()
    def refresh(self) -> None:
        for mine, theirs in self._buffers:
            mine.copy_(theirs)
        if self._processes.world_size == 1:
            torch._foreach_copy_(self._targets[0], self._sources)
            return
        for start, end in self._spans:
            packed = torch.zeros(end - start, dtype=self._dtype, device=self._processes.device)
            _pair(self._sources, packed, start, into_packed=True)
            gathered = torch.empty(self._processes.world_size * (end - start), dtype=self._dtype, device=packed.device)
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

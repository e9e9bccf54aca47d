"""Whole parameters on every rank, filled from flat pieces that lie wherever ZeRO has put them.

The pieces are laid end to end in flat buffers whose layout never changes, so that a fill is a few calls however many
pieces there are: one cast into the send buffer, and for each chunk one all-gather and one copy. What is received at
once is bounded over all ranks together.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.training.distributed import DistributedContext
from pretrain.training.zero.deepspeed_config import LARGEST_RECEIVED


class Piece(NamedTuple):
    """Values [start, start + len(values)) of the flattened parameter `name`, which this rank answers for."""

    name: str
    start: int
    values: Tensor


class _Chunk(NamedTuple):
    """One all-gather: what is sent and received, and the `targets` with their places `inside` the latter."""

    sent: Tensor
    received: Tensor
    targets: list[Tensor]
    inside: list[Tensor]


class Gathered:
    """parameters: whole tensors of one dtype, by name, that `fill` overwrites. pieces: this rank's. Collective.

    Raises ValueError where the pieces of all ranks do not cover the parameters.
    """

    def __init__(self, parameters: Mapping[str, Tensor], pieces: Sequence[Piece], context: DistributedContext) -> None:
        self._context = context
        self._sources = [piece.values for piece in pieces]
        layouts: list[list[tuple[str, int, int]]] = context.gather(
            [(piece.name, piece.start, piece.values.numel()) for piece in pieces]
        )
        flat = {name: parameter.view(-1) for name, parameter in parameters.items()}
        covered = dict.fromkeys(flat, 0)
        targets: list[list[Tensor]] = []
        for layout in layouts:
            targets.append([flat[name].narrow(0, start, length) for name, start, length in layout])
            for name, _, length in layout:
                covered[name] += length
        holes = sorted(name for name, count in covered.items() if count != flat[name].numel())
        if holes:
            raise ValueError(f"parameters are not covered by the pieces of all ranks: {holes[:3]}")
        self._chunks: list[_Chunk] = []
        self._packed: list[Tensor] = targets[0]  # where this rank's pieces go: with one rank the parameters themselves
        if context.world_size > 1:
            self._lay_out(targets, next(iter(flat.values())).dtype)

    def _lay_out(self, targets: Sequence[Sequence[Tensor]], dtype: torch.dtype) -> None:
        """The buffers, and what is copied between them and the pieces. targets: of every rank, in rank order."""
        ranks, device = self._context.world_size, self._context.device
        longest = max((sum(target.numel() for target in pieces) for pieces in targets), default=0)
        length = min(longest, max(1, LARGEST_RECEIVED // ranks))
        send = torch.zeros(longest, dtype=dtype, device=device)
        received = torch.empty(ranks * length, dtype=dtype, device=device)
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

    def fill(self) -> None:
        """Collective."""
        if self._packed:
            torch._foreach_copy_(self._packed, self._sources)
        for chunk in self._chunks:
            dist.all_gather_into_tensor(chunk.received, chunk.sent, group=self._context.device_group)
            torch._foreach_copy_(chunk.targets, chunk.inside)


def shared_buffers(module: nn.Module, task: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """(buffer of `module`, buffer of `task` of the same name), of those that both have."""
    theirs = dict(task.named_buffers())
    return [(buffer, theirs[name]) for name, buffer in module.named_buffers() if name in theirs]


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

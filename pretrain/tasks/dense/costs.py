"""What heads cost for one picture, counted without memory: values that the backward pass needs, and multiply-adds."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode


class HeadCosts(NamedTuple):
    """values: kept for the backward pass, 4 bytes each, since heads compute in fp32. multiply_adds: of the forward."""

    values: float
    multiply_adds: float


def head_costs(call: Callable[[], object], heads: Iterable[nn.Module], given: Iterable[Tensor]) -> HeadCosts:
    """Of `call`, which runs heads on the meta device. given: its inputs; neither these nor parameters are counted."""
    own = {p.untyped_storage()._cdata for head in heads for p in head.parameters()}
    own |= {p.untyped_storage()._cdata for p in given}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        where = tensor.untyped_storage()._cdata
        if where not in own:
            kept[where] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor), FlopCounterMode(display=False) as counter:
        call()
    values = sum(tensor.untyped_storage().nbytes() / 4 for tensor in kept.values())
    return HeadCosts(values, counter.get_total_flops() / 2)


def stage_maps(widths: Iterable[int], side: int) -> list[Tensor]:
    """The four stages' maps of one picture of `side` x `side`, on the meta device."""
    return [
        torch.empty(1, width, side // (4 << stage), side // (4 << stage), device="meta", requires_grad=True)
        for stage, width in enumerate(widths)
    ]

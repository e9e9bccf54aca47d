"""ZeRO-3 from the first value on: a module made on the meta device is cut parameter by parameter as it gets its values.

Only the leader's host ever holds the whole model, in fp32, and gives it up on the way. Every other rank holds its
share, and one whole parameter at a time; so a node needs the memory of one model, not of one a rank.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.training.distributed import DistributedContext
from pretrain.training.zero.engine import import_deepspeed


def partitions(stage: int, context: DistributedContext) -> bool:
    """Is a module of a run at this ZeRO stage made on the meta device, and cut here?"""
    return stage == 3 and context.world_size > 1


@torch.no_grad()
def partition(
    module: nn.Module,
    settings: Mapping[str, Any],
    context: DistributedContext,
    dtype: torch.dtype,
    *,
    source: nn.Module | None = None,
    exact: bool = False,
) -> dict[str, tuple[int, Tensor]]:
    """Fill and cut `module`, in place; collective. settings: the DeepSpeed JSON, of stage 3.

    module: on the meta device, alike on every rank. source: on the leader, the same module with values, which are taken
    away from it; zeros where it is None. exact: return name -> (start, this rank's part in fp32) of every parameter,
    for parameters are cut in `dtype`.
    """
    zero = import_deepspeed().zero
    theirs = {} if source is None else dict(source.named_parameters()) | dict(source.named_buffers())
    filled: dict[int, nn.Parameter] = {}  # by the identity of the empty one, which may have several names
    first: Any = None
    kept: dict[str, tuple[int, Tensor]] = {}
    for prefix, owner in list(module.named_modules()):
        for name, empty in list(owner.named_parameters(recurse=False)):
            if id(empty) in filled:
                setattr(owner, name, filled[id(empty)])
                continue
            path = f"{prefix}.{name}" if prefix else name
            whole = torch.zeros(empty.shape, dtype=torch.float32 if exact else dtype, device=context.device)
            if path in theirs:
                whole.copy_(theirs[path])
                theirs[path].data = theirs[path].new_empty(0)
            if exact:
                dist.broadcast(whole, 0)
            parameter: Any = nn.Parameter(whole.to(dtype), empty.requires_grad)
            if first is None:
                zero.Init(module=nn.ParameterList([parameter]), config_dict_or_path=copy.deepcopy(dict(settings)))
                first = parameter
            else:
                first.convert_to_zero_parameters(param_list=[parameter])
            if exact:
                start = min(whole.numel(), context.rank * parameter.ds_tensor.ds_numel)
                length = min(whole.numel() - start, parameter.ds_tensor.ds_numel)
                kept[path] = start, whole.view(-1).narrow(0, start, length).clone()
            filled[id(empty)] = parameter
            setattr(owner, name, parameter)
        for name, buffer in list(owner.named_buffers(recurse=False)):
            path = f"{prefix}.{name}" if prefix else name
            values = torch.zeros(buffer.shape, dtype=buffer.dtype, device=context.device)
            if path in theirs:
                values.copy_(theirs[path])
            dist.broadcast(values.view(-1).view(torch.uint8), 0)
            setattr(owner, name, values)
    return kept

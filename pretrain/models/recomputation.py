"""Recompute a block in the backward pass but for the outputs of its dear operations (activations.DEAR).

torch's `create_selective_checkpoint_contexts` does so inside compiled code. In eager mode it wants the second pass to
run operation by operation what the first ran, which ZeRO-3's hooks do not, so there two modes of our own look at the
dear operations alone.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from data_pipeline.errors import UserError
from pretrain.models.activations import Kept, image_activations, joined_weights

_ADDMM, _MM = torch.ops.aten.addmm.default, torch.ops.aten.mm.default
_CPU_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None)  # an x86 CPU's (see linear.py)


def recomputed(function: Callable[..., Tensor], kept: Kept, channels: int, hidden: int, *inputs: Any) -> Tensor:
    """function(*inputs), of which the backward pass finds `inputs` and the outputs of the kept kinds of operation.

    channels, hidden: widths of the block and of its MLP, which tell its products apart.
    """
    if not kept:
        return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    keeps = partial(_keeps, kept, channels, hidden)
    contexts = partial(_contexts, keeps)
    if torch.compiler.is_compiling():
        contexts = partial(create_selective_checkpoint_contexts, partial(_policy, keeps))
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def kind_of(operation: Any, arguments: Sequence[Any], channels: int, hidden: int) -> str | None:
    """Which dear operation of a block this is; None for the others."""
    if operation is torch.ops.dcnv3.packed_forward.default:
        return "sampling"
    if operation is torch.ops.aten.convolution.default:
        return "depthwise"
    if operation is _ADDMM or operation is _MM:
        inputs, weight = arguments[-2:]
        widths = inputs.shape[-1], weight.shape[-1]
    elif _CPU_LINEAR is not None and operation is _CPU_LINEAR.default:
        widths = arguments[0].shape[-1], arguments[1].shape[0]
    else:
        return None
    named = {(channels, hidden): "fc1", (hidden, channels): "fc2", (channels, channels): "projection"}
    return named.get(widths, "points")


def values_within(gigabytes: float, arguments: Mapping[str, Any], image_size: int, *, rows: int, width: int) -> float:
    """The budget in values an image, for `rows` images at once and values of `width` bytes.

    Raises UserError where the blocks' inputs alone, the least that training keeps, are more.
    """
    joined = joined_weights(arguments)
    least = (image_activations(arguments, image_size, checkpointing=True).peak * rows + joined) * width / 1e9
    if gigabytes < least:
        raise UserError(
            f"model.recompute.budget_gb {gigabytes:g}: {rows} images at once take at least {least:.3g} GB with every "
            "block recomputed; raise it, or training.accumulation"
        )
    return (gigabytes * 1e9 / width - joined) / rows


def _keeps(kept: Kept, channels: int, hidden: int, operation: Any, arguments: Sequence[Any]) -> bool:
    return kind_of(operation, arguments, channels, hidden) in kept


def _policy(keeps: Callable[..., bool], context: Any, operation: Any, *arguments: Any, **_: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if keeps(operation, arguments) else CheckpointPolicy.PREFER_RECOMPUTE


def _contexts(keeps: Callable[..., bool]) -> tuple["_Keep", "_Reuse"]:
    """What `checkpoint` enters in the first pass and in the second."""
    outputs: deque[Tensor] = deque()
    return _Keep(keeps, outputs), _Reuse(keeps, outputs)


class _Keep(TorchDispatchMode):
    """Puts away the outputs of the kept operations, in their order."""

    def __init__(self, keeps: Callable[..., bool], outputs: deque[Tensor]) -> None:
        super().__init__()
        self.keeps, self.outputs = keeps, outputs

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = operation(*args, **(kwargs or {}))
        if self.keeps(operation, args):
            self.outputs.append(output.detach())
        return output


class _Reuse(TorchDispatchMode):
    """Hands the outputs out again in the place of computing them. One backward pass only."""

    def __init__(self, keeps: Callable[..., bool], outputs: deque[Tensor]) -> None:
        super().__init__()
        self.keeps, self.outputs = keeps, outputs

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.keeps(operation, args):
            return operation(*args, **(kwargs or {}))
        if not self.outputs:
            raise RuntimeError("a block that keeps some of its outputs can go backward once only")
        return self.outputs.popleft()

"""`internimage inspect costs`: the kernel launches, bytes and FLOPs of a training step of the image model, by stage.

Nothing is computed: the model runs forward and backward on fake tensors, which have shapes and no memory, and every
operator that reaches the dispatcher is counted by these rules.

    launches   one an operator; more where `_PARTS` says so. Views and allocations launch nothing.
    bytes      every tensor that an operator is given is read once, every tensor it gives is written once, `_PARTS`
               aside: the sampling reads its map once, a product its weight once.
    FLOPs      two a multiply-add of products and convolutions; the sampling has `SAMPLING_COST` multiply-adds a point
               and channel forward, twice that backward.

What a step has beside the image model (losses, other towers, optimizer, collectives) is not counted. Compiling fuses
what is counted apart here. A block's bytes are also given in maps, those of its map N H W C in 16 bits: a pre-norm
block of width C with P columns of places moves 39 + 2 P/C forward and 78 + 6 P/C backward beside its weights, as
tests/launch/test_inspect_costs.py adds up.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from data_pipeline.errors import UserError
from dcnv3 import available_backends
from dcnv3.geometry import Geometry
from pretrain.configuration import RunConfig
from pretrain.configuration.schema import RecomputeBudget
from pretrain.models.counting import SAMPLING_COST
from pretrain.models.internimage import InternImage
from pretrain.models.recomputation import values_within

_NOTHING = ("detach", "_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
_FILLS = ("fill_", "zero_", "zeros", "zeros_like", "new_zeros", "full", "full_like", "ones_like")  # read nothing


@dataclass(frozen=True)
class Cost:
    launches: int = 0
    bytes: int = 0
    flops: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.launches + other.launches, self.bytes + other.bytes, self.flops + other.flops)


@dataclass(frozen=True)
class Row:
    """A part of the model. values: elements of its map, N H W C, where it has one (a block, a stage)."""

    part: str
    cost: Cost
    values: int = 0

    @property
    def units(self) -> float | None:
        """Bytes moved over those of one 16-bit map of the part."""
        return self.cost.bytes / (2 * self.values) if self.values else None


def _extent(tensor: Tensor) -> int:
    """Bytes of the elements that `tensor` really has: an expanded dimension has one."""
    elements = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride else min(size, 1)
    return elements


def _layer_norm_backward(grad: Tensor, x: Tensor, *_: Any) -> tuple[int, int]:
    """The gradient of the input is one kernel, those of weight and bias another, which reads both maps again."""
    return 1, _extent(grad) + _extent(x)


def _convolution_backward(grad: Tensor, x: Tensor, *rest: Any) -> tuple[int, int]:
    """A kernel each for input, weight and bias; every one reads the gradient."""
    mask = rest[-1]
    return sum(mask) - 1, (sum(mask) - 1) * _extent(grad)


def _sampling_backward(grad: Tensor, value: Tensor, *given: Any) -> tuple[int, int]:
    """The value's gradient is summed in memory, in fp32 for 16 bits: zeroed, added to, then rounded to its type.

    Where CUDA makes the value's by tiles, another kernel than that of the points does, and reads all but the value
    again.
    """
    geometry = Geometry(*[each for each in given if not isinstance(each, Tensor)][: len(Geometry._fields)])
    places = [tensor for tensor in given if isinstance(tensor, Tensor)]
    tiled = _tiles_apply(geometry, grad)
    again = _extent(grad) + sum(_extent(tensor) for tensor in places) if tiled else 0
    size = max(4, value.element_size()) * value.numel()
    if value.element_size() < 4:
        return 2 + tiled, 4 * size + again  # zeroed; read and written by the sums; read to be rounded
    return 1 + tiled, 2 * size + again  # zeroed; read by the sums, whose writing is the output's


def _tiles_apply(geometry: Geometry, grad: Tensor) -> bool:
    """csrc/cuda/launch.h: tiles_apply, for tensors that are aligned."""
    height, width, channels = grad.shape[1:]
    sizes = geometry.kernel_h, geometry.kernel_w, geometry.stride_h, geometry.stride_w
    plain = (*sizes, geometry.dilation_h, geometry.dilation_w) == (3, 3, 1, 1, 1, 1) and not geometry.remove_center
    wide = channels // geometry.groups in (16, 32) and width >= 6 and height >= 4
    return plain and wide and grad.dtype != torch.float64


def _norm_backward(_grad: Tensor, x: Tensor, *_: Any) -> tuple[int, int]:
    """Weight and bias get theirs from fp32 sums over shares of the rows: written, and read in the same launch."""
    channels = x.shape[-1]
    shares = min(2048, -(-x.numel() // channels // 16))  # csrc/norm.h: rows_of_a_warp
    return 0, 2 * shares * 2 * channels * 4


# Operator -> launches and bytes beyond one launch that reads its inputs and writes its outputs.
_PARTS: dict[str, Callable[..., tuple[int, int]]] = {
    "aten::native_layer_norm_backward": _layer_norm_backward,
    "aten::convolution_backward": _convolution_backward,
    "dcnv3::norm_backward": _norm_backward,
    "dcnv3::norm_backward_split": lambda grad, _again, _residual, x, *rest: _norm_backward(grad, x, *rest),
    "dcnv3::norm_backward_scaled": lambda grad, _factor, x, *rest: _norm_backward(grad, x, *rest),
    "dcnv3::backward": _sampling_backward,
    "dcnv3::packed_backward": _sampling_backward,
}


_SAMPLING = tuple(
    getattr(torch.ops.dcnv3, prefix + direction) for prefix in ("", "packed_") for direction in ("forward", "backward")
)


def _flops(operator: Any, arguments: tuple[Any, ...], options: dict[str, Any], result: Any) -> int:
    if operator.overloadpacket in _SAMPLING:
        backward = "backward" in operator.__name__
        names = [argument.name for argument in operator._schema.arguments]
        given = dict(zip(names, arguments, strict=True))
        points = given["kernel_h"] * given["kernel_w"] - given["remove_center"]
        places = arguments[0].numel() if backward else result.numel()
        return 2 * SAMPLING_COST * points * places * (2 if backward else 1)
    if operator.overloadpacket is torch.ops.aten.convolution_backward:
        grad, _x, weight, *_rest, needed = arguments
        # Of input and weight each as many as forward. torch's counter takes the weight's for that of a convolution
        # without groups: for a depthwise one C times too many, more than the rest of the block has.
        return 2 * grad.numel() * weight[0].numel() * (needed[0] + needed[1])
    counted = flop_registry.get(operator.overloadpacket)
    if counted is not None:
        return int(counted(*arguments, **options, out_val=result))
    if operator.namespace == "mkldnn" and "linear" in operator.__name__:
        return 2 * arguments[0].numel() * int(arguments[1].shape[0])
    return 0


class Counter(TorchDispatchMode):
    """Counts what runs inside, under the label `part` of the moment."""

    def __init__(self) -> None:
        super().__init__()
        self.part = ""
        self.costs: dict[str, Cost] = {}
        self.operators: dict[str, int] = {}  # operator -> calls

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        result = operator(*args, **options)
        name = operator.overloadpacket.__name__
        if operator.is_view or operator.namespace == "prim" or name in _NOTHING:
            return result
        full = f"{operator.namespace}::{name}"
        given = [] if name in _FILLS else [t for t in tree_leaves((args, options)) if isinstance(t, Tensor)]
        moved = sum(_extent(t) for t in (*given, *(t for t in tree_leaves(result) if isinstance(t, Tensor))))
        launches = 1
        if full in _PARTS:
            further, again = _PARTS[full](*args)
            launches, moved = launches + further, moved + again
        cost = Cost(launches, moved, _flops(operator, args, options, result))
        self.costs[self.part] = self.costs.get(self.part, Cost()) + cost
        self.operators[full] = self.operators.get(full, 0) + 1
        return result

    def follow(self, module: nn.Module, part: str) -> None:
        """Label what `module` runs forward, and what runs backward from its output on, with `part`."""
        before: list[str] = []

        def enter(_module: nn.Module, _inputs: Any) -> None:
            before.append(self.part)
            self.part = part

        def leave(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            self.part = before.pop()
            if output.requires_grad:
                output.register_hook(self._back_in(part))

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)

    def _back_in(self, part: str) -> Callable[[Tensor], None]:
        def hook(_gradient: Tensor) -> None:
            self.part = part

        return hook


def _fake(model: nn.Module, dtype: torch.dtype) -> None:
    """Give a model that was built on the meta device fake parameters and buffers of the CPU, in `dtype`.

    Initial values cannot be drawn for fake tensors, nor kernels be chosen for the meta device.
    """
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.empty(parameter.shape, dtype=dtype)))
        for name, buffer in list(module.named_buffers(recurse=False)):
            kept = torch.float32 if buffer.is_floating_point() else buffer.dtype
            setattr(module, name, torch.empty(buffer.shape, dtype=kept))


def step_costs(
    arguments: dict[str, Any],
    *,
    image_size: int,
    batch: int,
    dtype: torch.dtype,
    recompute: str | RecomputeBudget = "none",
) -> list[Row]:
    """Forward and backward of `batch` images [B, 3, S, S] through InternImage(**arguments) in training.

    recompute: as model.recompute; a budget is for these images.
    Rows: stem, of each stage one block and the whole stage with its way down, head, step.
    """
    reason = available_backends()["cpu"]
    if reason is not None:
        raise UserError(f"inspect costs: the operator is counted as its CPU kernels are called, but {reason}")
    counter = Counter()
    with torch.device("meta"):
        model = InternImage(**arguments).train()
    with FakeTensorMode():
        _fake(model, dtype)
        if isinstance(recompute, RecomputeBudget):
            width = dtype.itemsize
            budget = values_within(recompute.budget_gb, model.arguments, image_size, rows=batch, width=width)
            model.recompute_within(budget, image_size)
        else:
            model.set_grad_checkpointing(recompute == "blocks")
        counter.part = "head"
        counter.follow(model.stem, "stem")
        depths, maps = [], []
        side = image_size // 2
        for number, stage in enumerate(model.stages):
            side = (side + 1) // 2
            counter.follow(stage, f"stage {number + 1}")
            if stage.downsample is not None:
                counter.follow(stage.downsample, f"stage {number + 1}")
            for block in stage.blocks:
                counter.follow(block, f"blocks of stage {number + 1}")
            depths.append(len(stage.blocks))
            maps.append(batch * side * side * stage.blocks[0].dcn.channels)
        images = torch.empty(batch, arguments.get("in_chans", 3), image_size, image_size, dtype=dtype)
        with counter:
            output = model(images)
            counter.part = "head"
            output.backward(torch.empty_like(output))
    rows = [Row("stem", counter.costs["stem"])]
    for number, (depth, values) in enumerate(zip(depths, maps, strict=True)):
        blocks = counter.costs[f"blocks of stage {number + 1}"]
        one = Cost(round(blocks.launches / depth), blocks.bytes // depth, blocks.flops // depth)
        whole = blocks + counter.costs.get(f"stage {number + 1}", Cost())
        rows += [Row(f"stage {number + 1}, a block", one, values), Row(f"stage {number + 1}", whole, values)]
    rows.append(Row("head", counter.costs["head"]))
    return [*rows, Row("step", sum(counter.costs.values(), Cost()))]


def costs_table(config: RunConfig, batch: int) -> tuple[list[dict[str, Any]], Table]:
    """Rows (for --json) and a table of `step_costs` of a run's image model, for a micro-batch of `batch` images."""
    from pretrain.tasks.module import image_of
    from pretrain.tasks.task import module_of

    with torch.device("meta"):
        arguments = image_of(module_of(config, classes=config.model.num_classes or 1000)).arguments
    rows = step_costs(
        arguments,
        image_size=config.data.image_size,
        batch=batch,
        dtype={"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.training.precision],
        recompute=config.model.recompute,
    )
    table = Table(
        title=f"{batch} images of {config.data.image_size} px forward and backward, {config.training.precision}",
        caption="maps: bytes over those of one map N H W C in 16 bits. FLOP/byte: where it is below a device's FLOP/s "
        "over its bandwidth, memory is the limit. Losses, other towers and the optimizer are not counted.",
    )
    for heading in ("", "launches", "GB", "maps", "TFLOP", "FLOP/byte"):
        table.add_column(heading, justify="right" if heading else "left")
    for row in rows:
        cost = row.cost
        table.add_row(
            row.part,
            f"{cost.launches:,}",
            f"{cost.bytes / 1e9:.2f}",
            "" if row.units is None else f"{row.units:,.0f}",
            f"{cost.flops / 1e12:.3f}",
            f"{cost.flops / cost.bytes:.0f}",
        )
    return [{"part": row.part, **asdict(row.cost), "maps": row.units} for row in rows], table

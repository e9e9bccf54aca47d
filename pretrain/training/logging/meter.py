"""The numbers of a step, from where they arise to the log: losses, lr, times, memory."""

import math
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from pretrain.training.distributed import DistributedContext

R = TypeVar("R")


class Meter:
    """Sums over micro-batches and steps since the last log; means over ranks only when asked for."""

    def __init__(self, context: DistributedContext, batch_size: int, precision: str) -> None:
        self._context, self._batch_size, self._precision = context, batch_size, precision
        self._micro_losses: list[Tensor] = []
        self._clear()
        self._mark = time.perf_counter()

    def _clear(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}  # diagnostics are measured on logged steps only, losses on all
        self._steps = 0
        self._wait = self._elapsed = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what waits for data."""
        start = time.perf_counter()
        yield
        self._wait += time.perf_counter() - start

    def add(self, total: Tensor, parts: Mapping[str, Tensor], metrics: Mapping[str, Tensor]) -> None:
        """One micro-batch's output; no device synchronisation."""
        self._micro_losses.append(total.detach().float())
        named = {f"loss/{name}": value for name, value in parts.items()} | dict(metrics)
        for name, value in named.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def loss(self) -> float:
        """Mean over this step's micro-batches and all ranks. Collective."""
        mine = float(torch.stack(self._micro_losses).mean())
        self._micro_losses.clear()
        return self._context.sum([mine])[0] / self._context.world_size

    def end_step(self) -> None:
        now = time.perf_counter()
        self._elapsed, self._mark, self._steps = self._elapsed + now - self._mark, now, self._steps + 1

    def pause(self) -> None:
        """What happened since the last step's end (a rollback, the start) is no step's time."""
        self._mark = time.perf_counter()

    def collect(self, loss: float, lr: float, norm: float, flops_per_sample: float | None) -> dict[str, float]:
        """Everything since the last call, averaged. Collective: all ranks call it at the same step.

        flops_per_sample: of one training step, for tflops_per_rank and, on a GPU whose peak is known, mfu.
        """
        names = sorted(self._sums)
        local = [float(self._sums[name]) / self._counts[name] for name in names]
        world, steps = self._context.world_size, max(1, self._steps)
        means = [value / world for value in self._context.sum([*local, self._wait])]
        step_seconds = self._elapsed / steps
        values = {"loss": loss, **dict(zip(names, means, strict=False)), "lr": lr, "grad_norm": norm}
        values["images_per_second"] = self._batch_size / step_seconds if step_seconds else 0.0
        values["data_wait_ms"] = 1e3 * means[-1] / steps
        values["step_ms"] = 1e3 * step_seconds
        values["memory_mb"] = memory_mb(self._context.device)
        if flops_per_sample:
            achieved = flops_per_sample * values["images_per_second"] / world
            values["tflops_per_rank"] = achieved / 1e12
            if peak := _peak_here(self._context.device, self._precision):
                values["mfu"] = achieved / peak
        self._clear()
        return values


def memory_mb(device: torch.device) -> float:
    """Peak allocated on the GPU since the start; the process's peak resident size on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


# Dense peaks of one device by the vendors' data sheets, TFLOP/s: half precision, TF32, fp32 outside the tensor cores.
_PEAKS = {
    "H200": (989.0, 494.0, 67.0),
    "H100 PCIe": (756.0, 378.0, 51.0),
    "H100 NVL": (835.0, 417.0, 60.0),
    "H100": (989.0, 494.0, 67.0),
    "A100": (312.0, 156.0, 19.5),
    "L40S": (362.0, 183.0, 91.6),
}


def peak_flops(name: str, precision: str, *, tf32: bool = False) -> float | None:
    """FLOP/s that a device of this name can do at most; None where it is not known.

    precision: fp32, bf16, fp16. tf32: may fp32 matrix products be rounded to TF32?
    """
    found = next((peaks for key, peaks in _PEAKS.items() if key in name), None)
    if found is None:
        return None
    half, tensor, plain = found
    return 1e12 * (half if precision != "fp32" else tensor if tf32 else plain)


def _peak_here(device: torch.device, precision: str) -> float | None:
    if device.type != "cuda":
        return None
    tf32 = torch.get_float32_matmul_precision() != "highest"
    return peak_flops(torch.cuda.get_device_name(device), precision, tf32=tf32)


def count_flops(call: Callable[[], R], samples: int) -> tuple[R, float]:
    """Run `call()` once; (its result, its FLOPs a sample).

    Matrix products, attention and convolutions are counted, as torch's flop counter knows them; the sampling of DCNv3
    is not.
    """
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    def attention(*shapes: object, **_: object) -> int:
        return int(sdpa_flop_count(*shapes[:3]))

    def linear(x: Sequence[int], weight: Sequence[int], *_: object, **__: object) -> int:
        return 2 * math.prod(x) * weight[0]

    # What a CPU fuses, which the counter does not know in every version.
    unknown: dict[Any, Any] = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        unknown[torch.ops.mkldnn._linear_pointwise] = linear
    with FlopCounterMode(display=False, custom_mapping=unknown) as counter:
        result = call()
    return result, counter.get_total_flops() / max(1, samples)

"""The numbers of a step, from where they arise to the log: losses, lr, times, memory."""

import math
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypedDict, TypeVar

import torch
from torch import Tensor

from pretrain.training.distributed import DistributedContext
from pretrain.training.logging.kinds import LOSS, WEIGHTED

R = TypeVar("R")


class MeterState(TypedDict):
    """The sums of an interval that a checkpoint cuts. sums, counts: by metric; the others over `applied` steps."""

    sums: dict[str, float]
    counts: dict[str, int]
    applied: int
    loss: float
    norm: float


class Meter:
    """Means since the last log: losses over micro-batches, steps and ranks, times over the steps of this process.

    Every loss is a mean over the same steps, those that changed the weights, so `loss` is what its weighted parts add
    up to. weights: of the parts in the total; a part without one counts whole.
    """

    def __init__(
        self, context: DistributedContext, batch_size: int, precision: str, weights: Mapping[str, float] | None = None
    ) -> None:
        self._context, self._batch_size, self._precision = context, batch_size, precision
        self._weights = dict(weights or {})
        self._micro_losses: list[Tensor] = []
        self._micro_values: list[tuple[str, Tensor]] = []
        self._last_loss = 0.0
        self._clear()
        self._mark = time.perf_counter()

    def _clear(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}  # diagnostics are measured on logged steps only, losses on all
        self._applied, self._loss_sum, self._norm_sum = 0, 0.0, 0.0
        self._timed = 0
        self._wait = self._elapsed = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what waits for data."""
        start = time.perf_counter()
        yield
        self._wait += time.perf_counter() - start

    def add(self, total: Tensor, parts: Mapping[str, Tensor]) -> None:
        """One micro-batch's losses; no device synchronisation."""
        self._micro_losses.append(total.detach().float())
        self.measure({f"{LOSS}{name}": value for name, value in parts.items()})

    def measure(self, metrics: Mapping[str, Tensor]) -> None:
        """Other numbers of a micro-batch, after its backward pass; no device synchronisation."""
        self._micro_values += [(name, value.detach().double()) for name, value in metrics.items()]

    def micro_loss(self) -> Tensor:
        """This rank's mean over the micro-batches of the step, 0-d, on the device; no synchronisation."""
        mine = torch.stack(self._micro_losses).mean()
        self._micro_losses.clear()
        return mine

    def end_step(self, *, applied: bool, loss: float, norm: float) -> None:
        """applied: whether the step changed the weights; one that did not counts in no mean but those of time.

        loss: of the step, over all ranks.
        """
        self._last_loss = loss
        now = time.perf_counter()
        self._elapsed, self._mark, self._timed = self._elapsed + now - self._mark, now, self._timed + 1
        if applied:
            self._applied += 1
            self._loss_sum += self._last_loss
            self._norm_sum += norm
            for name, value in self._micro_values:
                self._sums[name] = self._sums[name] + value if name in self._sums else value
                self._counts[name] = self._counts.get(name, 0) + 1
        self._micro_values.clear()

    def pause(self) -> None:
        """What happened since the last step's end (a rollback, the start) is no step's time."""
        self._mark = time.perf_counter()

    def state(self) -> MeterState:
        """The sums since the last log, averaged over the ranks, for a checkpoint. Collective."""
        names = sorted(self._sums)
        sums = self._context.sum([float(self._sums[name]) for name in names])
        return MeterState(
            sums={name: value / self._context.world_size for name, value in zip(names, sums, strict=True)},
            counts=dict(self._counts),
            applied=self._applied,
            loss=self._loss_sum,
            norm=self._norm_sum,
        )

    def load(self, state: MeterState | None) -> None:
        """Go on from a checkpoint's sums, so that the next log says what an unbroken run says; None: from nothing."""
        self._clear()
        if state is not None:
            device = self._context.device
            self._sums = {
                name: torch.tensor(v, dtype=torch.float64, device=device) for name, v in state["sums"].items()
            }
            self._counts = dict(state["counts"])
            self._applied, self._loss_sum, self._norm_sum = state["applied"], state["loss"], state["norm"]

    def collect(self, lr: float, flops_per_sample: float | None) -> dict[str, float]:
        """Everything since the last call, averaged. Collective: all ranks call it at the same step.

        flops_per_sample: of one training step, for tflops_per_rank and, on a GPU whose peak is known, mfu.
        Where no step changed the weights, `loss` is the last step's, and there is nothing else to average.
        """
        names = sorted(self._sums)
        local = [float(self._sums[name]) / self._counts[name] for name in names]
        world, applied = self._context.world_size, self._applied
        means = [value / world for value in self._context.sum([*local, self._wait])]
        values = {"loss": self._loss_sum / applied if applied else self._last_loss}
        values |= dict(zip(names, means, strict=False))
        values |= {
            WEIGHTED + name.removeprefix(LOSS): self._weights.get(name.removeprefix(LOSS), 1.0) * values[name]
            for name in names
            if name.startswith(LOSS)
        }
        step_seconds = self._elapsed / max(1, self._timed)
        values |= {"lr": lr, "grad_norm": self._norm_sum / applied if applied else math.nan}
        values["images_per_second"] = self._batch_size / step_seconds if step_seconds else 0.0
        values["data_wait_ms"] = 1e3 * means[-1] / max(1, self._timed)
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

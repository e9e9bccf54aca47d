"""What a run needs, before a device is booked: memory of a rank by ZeRO stage, and days. Pure functions of counts.

Bytes a parameter of DeepSpeed's training states, n ranks, p = 2 in bf16 and fp16, 4 in fp32 (Rajbhandari et al., "ZeRO:
Memory Optimizations Toward Training Trillion Parameter Models", SC 2020, section 3), and of what this project adds:

                 stage 0     stage 1     stage 2     stage 3
    parameters   p           p           p           p / n
    gradients    p           p           p / n       p / n          4 where half precision accumulates
    fp32 copy    4 (half)    4 / n       4 / n       4 / n
    Adam         8           8 / n       8 / n       8 / n
    average      4 / n       4 / n       4 / n       4 / n          fp32, each rank its share
    teacher      p           p           p           p / n          of the parameters that the teacher has

Buckets are what a collective has in flight; at stage 3 also the parameters gathered for the layers at hand. Of them,
what stands between the last backward pass and the update is one at stages 2 and 3 (`standing`); at stage 2 it is where
the gradients lie as long as the model fits into it. Where training.offload_folder is set, Adam's moments and the
average are in files; an asynchronous checkpoint keeps a copy of what it writes on the host, 16 / n a parameter.
"""

from collections.abc import Callable
from dataclasses import dataclass

from pretrain.training.zero.deepspeed_config import LARGEST_BUCKET

GIGABYTE = 1e9
SECONDS_A_DAY = 86_400.0
RESERVE = 0.9  # of a device's memory that a plan uses: the rest goes to the driver, to NCCL and to fragmentation
STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class Sizes:
    """Parameters of a task: those that are trained, those that only lie there, those of the teacher's copy."""

    trainable: int
    frozen: int = 0
    teacher: int = 0


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank's device. `host` is what it holds in the machine's memory beside that, for offloading and for
    checkpoints; `files` is what lies in mapped files.
    """

    stage: int
    parameters: float
    gradients: float
    optimizer: float
    average: float
    teacher: float
    buckets: float
    activations: float = 0.0
    host: float = 0.0
    files: float = 0.0
    standing: float = 0.0  # of the buckets, between the backward pass and the update; without overlap

    @property
    def states(self) -> float:
        """Everything but buckets and activations: what stays from step to step."""
        return self.parameters + self.gradients + self.optimizer + self.average + self.teacher

    @property
    def total(self) -> float:
        return self.states + self.buckets + self.activations


def rank_memory(
    sizes: Sizes,
    *,
    stage: int,
    ranks: int,
    precision: str,
    accumulation: int = 1,
    ema: bool = True,
    offload_optimizer: bool = False,
    offload_parameters: bool = False,
    offload_folder: bool = False,
    asynchronous: bool = False,
    activations: float = 0.0,
) -> Memory:
    """Bytes of one of `ranks` ranks. activations: of its micro-batch (`pretrain.analysis.costs`).

    offload_*: as in the configuration: the optimizer's states and the average, or the parameters, go to the host, or
    the former into files. asynchronous: checkpoints are; with files they are not, whatever is asked for.
    """
    half = precision != "fp32"
    p = 2.0 if half else 4.0
    share = 1.0 / ranks
    cut = [1.0 if stage < first else share for first in (1, 2, 3)]  # of optimizer, gradients, parameters
    trainable, everything = sizes.trainable, sizes.trainable + sizes.frozen
    parameters = p * everything * cut[2]
    fp32_gradients = half and accumulation > 1 and stage > 0
    gradients = (4.0 if fp32_gradients else p) * trainable * cut[1]
    fp32_copy = 4.0 if half or stage in (1, 2, 3) else 0.0
    optimizer = (8.0 + fp32_copy) * trainable * cut[0]
    average = 4.0 * trainable * share if ema else 0.0
    teacher = p * sizes.teacher * cut[2] if ema else 0.0
    bucket = min(LARGEST_BUCKET, trainable)
    buckets = 0.0 if stage == 0 else p * bucket * (3.0 if stage == 3 else 2.0)
    standing = p * bucket if stage >= 2 else 0.0
    if stage == 2 and bucket == trainable and not fp32_gradients:
        standing -= gradients
    host = files = 0.0
    if offload_folder:
        files = 8.0 * trainable * cut[0] + average
        optimizer, average = optimizer - 8.0 * trainable * cut[0], 0.0
    elif asynchronous:
        host = (16.0 if ema else 12.0) * trainable * share
    if offload_optimizer and stage > 0:
        host, optimizer, average = host + optimizer + average, 0.0, 0.0
    if offload_parameters and stage == 3:
        host, parameters = host + parameters, 0.0
    return Memory(
        stage, parameters, gradients, optimizer, average, teacher, buckets, activations, host, files, standing
    )


def smallest_stage(memory_of: Callable[[int], Memory], device_bytes: float) -> int | None:
    """The first ZeRO stage whose total fits in `RESERVE` of a device; None where even stage 3 does not.

    Smaller is better: a further stage sends as much or more.
    """
    for stage in STAGES:
        if memory_of(stage).total <= RESERVE * device_bytes:
            return stage
    return None


def largest_micro_batch(fixed: float, per_sample: float, device_bytes: float) -> int:
    """Samples of one forward pass that fit beside `fixed` bytes; 0 where not even one does."""
    return max(0, int((RESERVE * device_bytes - fixed) // per_sample)) if per_sample > 0 else 0


def days(samples: float, flops_per_sample: float, *, ranks: int, peak_flops: float, mfu: float) -> float:
    """Wall-clock days of `samples` training samples at a share `mfu` of the devices' peak, waiting for nothing."""
    return samples * flops_per_sample / (ranks * peak_flops * mfu) / SECONDS_A_DAY

"""What a run needs of a device, before one is booked: memory of a rank by ZeRO stage. Pure functions of counts.

Bytes a parameter of DeepSpeed's training states, n ranks, p = 2 in bf16 and fp16, 4 in fp32 (Rajbhandari et al., "ZeRO:
Memory Optimizations Toward Training Trillion Parameter Models", SC 2020, section 3), and of what this project adds:

                 stage 0     stage 1     stage 2     stage 3
    parameters   p           p           p           p / n          and p / s with a secondary partition over s ranks
    gradients    p           p           p / n       p / n          4 where half precision accumulates
    fp32 copy    4 (half)    4 / n       4 / n       4 / n
    Adam         8           8 / n       8 / n       8 / n          4 of what Muon trains
    average      4 / n       4 / n       4 / n       4 / n          fp32, each rank its share
    teacher      p           p           p           p / n          of the parameters that the teacher has

The update holds, beside these, the rank's gradients once more in fp32, which Adam reads: 4 / n (stage 0 in half
precision: 4). By then the activations are gone, so a rank's peak is the larger one of the two moments.

Buckets are what a collective has in flight; at stage 3 also the parameters gathered for the layers at hand. Of them,
what stands between the last backward pass and the update is one at stages 2 and 3 (`standing`); at stage 2 it is where
the gradients lie as long as the model fits into it. Where training.offload_folder is set, Adam's moments and the
average are in files; an asynchronous checkpoint keeps a copy of what it writes on the host, 16 / n a parameter.
"""

import math
from dataclasses import dataclass

from pretrain.training.zero.deepspeed_config import LARGEST_BUCKET, LARGEST_RECEIVED

GIGABYTE = 1e9
SECONDS_A_DAY = 86_400.0
RESERVE = 0.9  # of a device's memory that a plan uses: the rest goes to the driver, to NCCL and to fragmentation
STAGES = (0, 1, 2, 3)
_CONTRASTIVE_KEPT = 9.0  # bytes a similarity: the product (its scale is trained), the log-softmax, the mask


@dataclass(frozen=True)
class Sizes:
    """Parameters of a task: those that are trained, those that only lie there, those of the teacher's copy. muon: of
    those that are trained, the ones whose optimizer keeps one moment.
    """

    trainable: int
    frozen: int = 0
    teacher: int = 0
    muon: int = 0

    @property
    def moments(self) -> float:
        """Bytes of the optimizer's moments, in fp32."""
        return 8.0 * self.trainable - 4.0 * self.muon


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
    update: float = 0.0  # gradients in fp32, as the update reads them

    @property
    def states(self) -> float:
        """Everything but buckets and activations: what stays from step to step."""
        return self.parameters + self.gradients + self.optimizer + self.average + self.teacher

    @property
    def total(self) -> float:
        """The peak of a step: in the backward pass, or in the update."""
        return self.states + max(self.buckets + self.activations, self.standing + self.update)


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
    reduction_bytes: float | None = None,
    secondary_ranks: int | None = None,
    activations: float = 0.0,
) -> Memory:
    """Bytes of one of `ranks` ranks. activations: of its micro-batch (`pretrain.analysis.costs`). reduction_bytes: of a
    gradient's value on its way, `p` by default. secondary_ranks: of training.secondary_partition.

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
    moments = sizes.moments * cut[0]
    optimizer = moments + fp32_copy * trainable * cut[0]
    average = 4.0 * trainable * share if ema else 0.0
    teacher = p * (sizes.teacher * cut[2] + _refreshed_through(sizes, stage, ranks)) if ema else 0.0
    bucket = min(LARGEST_BUCKET, trainable)
    reduced = max(p, reduction_bytes or p)
    buckets = 0.0 if stage == 0 else p * bucket * (3.0 if stage == 3 else 2.0)
    if stage > 0 and reduced > p:
        buckets += reduced * bucket  # the copy that is reduced
    standing = {2: p, 3: reduced}.get(stage, 0.0) * bucket
    if stage == 2 and bucket == trainable and not fp32_gradients:
        standing -= gradients
    update = 4.0 * trainable * cut[0] if half or stage > 0 else 0.0
    host = files = 0.0
    if offload_folder:
        files = moments + average
        optimizer, average = optimizer - moments, 0.0
    elif asynchronous:
        host = (sizes.moments + (8.0 if ema else 4.0) * trainable) * share
    if offload_optimizer and stage > 0:
        host, optimizer, average, update = host + optimizer + average, 0.0, 0.0, 0.0
    if offload_parameters and stage == 3:
        host, parameters = host + parameters, 0.0
    if secondary_ranks is not None and stage == 3:
        parameters += p * everything / secondary_ranks
    return Memory(
        *(stage, parameters, gradients, optimizer, average, teacher, buckets, activations, host, files, standing),
        update=update,
    )


def _refreshed_through(sizes: Sizes, stage: int, ranks: int) -> float:
    """Values of the buffers by which a whole teacher is filled from the ranks' shares of the EMA (zero/teacher.py)."""
    if stage == 3 or ranks == 1:
        return 0.0
    sent = min(sizes.teacher, sizes.trainable / ranks)
    return sent + min(ranks * sent, LARGEST_RECEIVED)


def contrastive_bytes(rows: float, ranks: int, images: int) -> float:
    """What InfoNCE over the global micro-batch keeps on a rank (pretrain/objectives/contrastive.py).

    For each image of a row both directions, `rows` x `rows * ranks` similarities in fp32, scaled, masked and
    normalised; and for a moment two gradients of one of them.
    """
    return _CONTRASTIVE_KEPT * 2 * images * rows * rows * ranks + 8.0 * rows * rows * ranks


def largest_micro_batch(
    fixed: float, per_sample: float, device_bytes: float, *, ranks: int = 1, contrastive_images: int = 0
) -> int:
    """Samples of one forward pass that fit beside `fixed` bytes; 0 where not even one does.

    contrastive_images: of a row, that meet the texts of all ranks; 0: none.
    """
    room = RESERVE * device_bytes - fixed
    if per_sample <= 0 or room < per_sample:
        return 0
    square = contrastive_bytes(1.0, ranks, contrastive_images) if contrastive_images else 0.0
    if square == 0.0:
        return int(room // per_sample)
    return int((math.sqrt(per_sample**2 + 4 * square * room) - per_sample) / (2 * square))


def checkpoint_bytes(sizes: Sizes, *, ema: bool) -> float:
    """One checkpoint: weights, both moments and the EMA in fp32; what is frozen once."""
    return sizes.moments + (8.0 if ema else 4.0) * sizes.trainable + 4.0 * sizes.frozen

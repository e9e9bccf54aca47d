"""A training step of a classifier as training makes it, without DeepSpeed: the module cast to bf16, fp32 masters.

    images -> bf16 forward (drop path drawn by sample) -> cross-entropy in fp32 -> bf16 backward
           -> fp32 gradients, their norm clipped -> fused AdamW on fp32 masters -> bf16 weights

The learning rate is tiny, so that the offsets stay where `spread_offsets` put them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models import InternImage, create_model
from pretrain.models.counting import multiply_adds
from pretrain.models.randomness import drawing_from
from pretrain.models.variants import VARIANTS

LEARNING_RATE = 1e-6
CLASSES = 1000
PEAK_TFLOPS = 989.0  # H100 SXM, dense bf16, by its data sheet; the only peak that an MFU here refers to
TINY = {"channels": 16, "depths": (1, 1, 2, 1), "groups": (1, 2, 4, 8)}
TINY_HUGE = TINY | {"level2_post_norm_block_ids": (1,)}


def device_here() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.init()  # statistics of memory can be asked for before anything is allocated
    return torch.device("cuda", 0)


def compute_dtype(device: torch.device) -> torch.dtype:
    """bf16, but on a CPU, whose reduced form must be quick, fp32."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def internimage(letter: str, device: torch.device, *, tiny: bool) -> InternImage:
    """T, B or H with random weights, made on the device, whose points lie about a pixel off the regular grid."""
    small = (TINY_HUGE if letter == "H" else TINY) if tiny else {}
    with device:
        model = create_model(f"internimage_{letter.lower()}", num_classes=CLASSES, **small)
    spread_offsets(model)
    return model


@torch.no_grad()
def spread_offsets(model: nn.Module) -> None:
    """Offsets of about a pixel in place of a fresh model's zeros, with which sampling would be an aligned copy."""
    for name, parameter in model.named_parameters():
        if "offset" in name:
            nn.init.normal_(parameter, std=0.02 if parameter.ndim > 1 else 1.0)


def flops_of(letter: str, size: int, *, tiny: bool) -> float:
    """Of one image's training step: forward and twice that backward, a multiply-add as two."""
    arguments = VARIANTS[f"internimage_{letter.lower()}"].arguments | (TINY if tiny else {})
    return 6.0 * multiply_adds(arguments, size).total


def flops_of_peer(name: str, size: int) -> float:
    """The same of a timm model, whose products and convolutions torch counts."""
    import timm
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model, images = timm.create_model(name, num_classes=CLASSES), torch.empty(1, 3, size, size)
    with FlopCounterMode(display=False) as counter:
        model(images)
    return 3.0 * counter.get_total_flops()


class ModelStep:
    """A model with its optimizer on random images; calling it makes one training step."""

    def __init__(self, model: nn.Module, batch: int, size: int, device: torch.device) -> None:
        self.model = model.to(device).train()
        self.device, self.batch = device, batch
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.masters = [parameter.detach().float().clone() for parameter in trained]
        compute = compute_dtype(device)
        self.model.to(compute)
        self.weights: list[Tensor] = [*trained]
        self.gradients = [torch.zeros_like(master) for master in self.masters]
        for master, gradient in zip(self.masters, self.gradients, strict=True):
            master.grad = gradient
        self.optimizer = torch.optim.AdamW(self.masters, lr=LEARNING_RATE, weight_decay=0.05, fused=True)
        self.images = torch.randn(batch, 3, size, size, device=device, dtype=compute)
        self.images = self.images.contiguous(memory_format=torch.channels_last)
        self.labels = torch.randint(CLASSES, (batch,), device=device)
        self.keys = torch.randint(2**62, (batch,), device=device)

    def loss(self) -> Tensor:
        keyed = drawing_from(self.keys) if isinstance(self.model, InternImage) else nullcontext()
        with keyed:
            logits = self.model(self.images)
        return F.cross_entropy(logits.float(), self.labels)

    def __call__(self) -> None:
        self.loss().backward()
        gradients = [weight.grad for weight in self.weights if weight.grad is not None]
        if len(gradients) < len(self.weights):
            raise RuntimeError("a parameter of this model has no gradient: no loss reaches it")
        torch._foreach_copy_(self.gradients, gradients)
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0, foreach=True)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.masters)
        self.model.zero_grad(set_to_none=True)

    def shrink(self, batch: int) -> None:
        """From now on only the first `batch` images."""
        self.images, self.labels, self.keys = self.images[:batch], self.labels[:batch], self.keys[:batch]
        self.batch = len(self.images)

    @property
    def parameters(self) -> int:
        return sum(weight.numel() for weight in self.weights)


def summary(seconds: Sequence[float], batch: int) -> dict[str, float]:
    """Images a second by the median of the turns, and milliseconds of a step with quartiles."""
    low, middle, high = statistics.quantiles(seconds, method="inclusive")
    return {
        "images_per_second": round(batch / middle, 1),
        "step_ms": round(1e3 * middle, 2),
        "step_ms_low": round(1e3 * low, 2),
        "step_ms_high": round(1e3 * high, 2),
    }


def take_turns(contenders: Mapping[str, ModelStep], turns: int, steps: int) -> dict[str, list[float]]:
    """Seconds a step of each turn: `steps` steps of each, one contender after the other; all have run before."""
    spent: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(turns):
        for name, step in contenders.items():
            synchronize(step.device)
            started = time.perf_counter()
            for _ in range(steps):
                step()
            synchronize(step.device)
            spent[name].append((time.perf_counter() - started) / steps)
    return spent

"""GPU kinds as a plan knows them, from the vendor's data sheets and reference machines; nothing here is a default.

memory: GB (1e9 bytes). half, tf32, single: dense peaks, TFLOP/s; half is bf16 (of a V100, which has none, fp16).
link: NVLink of one GPU in one direction, GB/s. network: a GPU's share of its node's network in the vendor's reference
machine (DGX or HGX, eight GPUs), in one direction, GB/s.

InternImage's share of the peak was measured on one H200, without communication (docs/gpu.md): those figures stand here,
by parameters. On another kind of GPU they are an assumption, and a plan says so.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import log

from data_pipeline.errors import UserError


@dataclass(frozen=True)
class Device:
    name: str
    memory: float
    half: float
    tf32: float
    single: float
    link: float
    network: float
    bf16: bool = True

    def peak(self, precision: str) -> float:
        """TFLOP/s. Raises UserError where the device does not have the type."""
        if precision == "bf16" and not self.bf16:
            raise UserError(f"--gpu {self.name} has no bf16: plan with training.precision=fp16")
        return self.single if precision == "fp32" else self.half


DEVICES = {
    device.name: device
    for device in (
        Device("v100", 32, 125, 15.7, 15.7, 150, 6.25, bf16=False),
        Device("a100-40", 40, 312, 156, 19.5, 300, 25),
        Device("a100", 80, 312, 156, 19.5, 300, 25),
        Device("h100", 80, 989, 494, 67, 450, 50),
        Device("h200", 141, 989, 494, 67, 450, 50),
        Device("b200", 180, 2250, 1125, 75, 900, 50),
    )
}
MEASURED_ON = "h200"
# (million parameters, share of the peak: the model's FLOPs of a training step, in bf16, eager, over the step's time)
MEASURED_SHARES = ((30.0, 0.047), (97.0, 0.084), (1080.0, 0.189))
SPREAD = (0.8, 1.25)  # of a measured share: another batch, compiled or not, another machine


def device_named(name: str) -> Device:
    if name not in DEVICES:
        raise UserError(f"--gpu {name!r}: known are {', '.join(DEVICES)}; or give --memory, --peak and --mfu yourself")
    return DEVICES[name]


def likely_share(parameters: float, table: Sequence[tuple[float, float]] = MEASURED_SHARES) -> tuple[float, float]:
    """Lowest and highest likely share of the peak for a model of so many parameters: between the measured ones by
    straight lines over the logarithm of the size, and `SPREAD` about that.
    """
    millions = min(max(parameters / 1e6, table[0][0]), table[-1][0])
    share = table[-1][1]
    for (small, low), (large, high) in pairwise(table):
        if small <= millions <= large:
            share = low + (high - low) * (log(millions) - log(small)) / (log(large) - log(small))
            break
    return SPREAD[0] * share, SPREAD[1] * share

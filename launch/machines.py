"""The machines that a plan is made for: what the user says of them, and what the table of GPU kinds knows."""

from dataclasses import dataclass
from typing import Self

from pretrain.analysis.communication import EFFICIENCY, Network
from pretrain.analysis.hardware import MEASURED_ON, device_named, likely_share
from pretrain.configuration import RunConfig


@dataclass(frozen=True)
class Machine:
    """What is known of the devices; None: it is not.

    memory: GB of a device. peak: TFLOP/s at the run's precision; mfu: share of it, as given. assumptions: where each
    figure comes from, for people.
    """

    gpu: str | None
    memory: float | None
    peak: float | None
    mfu: float | None
    network: Network | None
    assumptions: tuple[str, ...]

    @classmethod
    def of(
        cls,
        config: RunConfig,
        gpu: str | None = None,
        memory: float | None = None,
        peak: float | None = None,
        mfu: float | None = None,
        gpus_per_node: int = 8,
        node_network: float | None = None,
    ) -> Self:
        """What is given, and for the rest what the kind of GPU says; without either, nothing is assumed.

        Raises UserError for a kind that is not known, or does not have the run's precision.
        """
        if gpu is None:
            told = () if memory is None else ("communication takes no time: --gpu says its speed",)
            return cls(None, memory, peak, mfu, None, told)
        device, precision = device_named(gpu), config.training.precision
        between = node_network if node_network is not None else device.network * gpus_per_node
        whose = "given" if node_network is not None else "the vendor's reference machine"
        said = (
            f"{device.name}: {device.memory:g} GB, {device.peak(precision):g} TFLOP/s in {precision}, NVLink "
            f"{device.link:g} GB/s a GPU in one direction (data sheet)",
            f"between nodes of {gpus_per_node} GPUs {between:g} GB/s a node ({whose}); {EFFICIENCY:.0%} of either "
            "speed is reached; no latency is counted",
        )
        network = Network(device.link, between, gpus_per_node)
        return cls(gpu, memory or device.memory, peak or device.peak(precision), mfu, network, said)

    def likely(self, parameters: float) -> tuple[tuple[float, float] | None, list[str]]:
        """(lowest, highest) share of the peak for an image model of so many parameters, and where that comes from."""
        if self.mfu is not None:
            return (self.mfu, self.mfu), [f"share of the peak {self.mfu:.1%}: given"]
        if self.gpu is None:
            return None, []
        low, high = likely_share(parameters)
        elsewhere = "" if self.gpu == MEASURED_ON else f", assumed the same on {self.gpu}"
        return (low, high), [
            f"share of the peak {low:.1%} to {high:.1%}: measured on one {MEASURED_ON}, eager, in bf16 "
            f"(docs/gpu.md), a quarter more or less{elsewhere}"
        ]

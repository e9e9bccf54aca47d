"""What the ranks of a run send each other in a step, by ZeRO stage, and how long that takes. Pure.

Bytes of a collective over the whole of a buffer S, n ranks in a ring: each rank sends (n - 1) / n S for an all-gather
or a reduce-scatter, twice that for an all-reduce (Rajbhandari et al., "ZeRO", SC 2020, section 7). Per step, with p
bytes a value in forward and backward, g bytes a value in the reduction of gradients, A micro-batches:

                 gradients              parameters                   teacher
    stage 0      all-reduce g           -                            all-gather p
    stage 1      reduce-scatter g       all-gather p                 all-gather p
    stage 2      A reduce-scatters g    all-gather p                 all-gather p
    stage 3      A reduce-scatters g    2 A all-gathers p            A all-gathers p, inside its forward pass
                                        with training.secondary_partition A of them among so many ranks only

A ring crosses the border of every node once in each direction, over all of the node's network cards together; so over
several nodes its speed is the smaller one of a GPU's link and its node's network. `EFFICIENCY` of either is reached.

At stages 1 to 3 the reduction runs beside the backward pass, two thirds of the work; at stage 3 parameters are fetched
ahead of both passes. What is left beyond that is exposed: the step is longer by it. So is what follows the update:
the all-gathers of stages 1 and 2 and of the teacher, and all of stage 0's reduction, which DeepSpeed makes at the end.
"""

from dataclasses import dataclass

from pretrain.analysis.plan import Sizes

EFFICIENCY = 0.8
_BACKWARD = 2 / 3  # of the work of a step


@dataclass(frozen=True)
class Network:
    """link: GB/s of a GPU to its neighbours in the node. network: GB/s of a node to others. Both in one direction."""

    link: float
    network: float
    gpus_per_node: int

    def bytes_per_second(self, ranks: int) -> float:
        slowest = self.link if ranks <= self.gpus_per_node else min(self.link, self.network)
        return 1e9 * EFFICIENCY * slowest


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends in a step."""

    gradients: float
    parameters: float
    teacher: float
    overlapped: bool  # the gradients' reduction with the backward pass
    secondary: float = 0.0  # of parameters, within a secondary partition

    @property
    def total(self) -> float:
        return self.gradients + self.parameters + self.teacher + self.secondary


def step_traffic(
    sizes: Sizes,
    *,
    stage: int,
    ranks: int,
    precision: str,
    reduction_bytes: float,
    accumulation: int = 1,
    secondary_ranks: int | None = None,
) -> Traffic:
    """reduction_bytes: of one value of a gradient on its way (training.reduce_gradients). secondary_ranks: of
    training.secondary_partition.
    """
    ring = (ranks - 1) / ranks
    p = 4.0 if precision == "fp32" else 2.0
    everything = sizes.trainable + sizes.frozen
    gradients = ring * reduction_bytes * sizes.trainable * (2 if stage == 0 else accumulation if stage >= 2 else 1)
    parameters = {0: 0.0, 3: ring * p * everything * 2 * accumulation}.get(stage, ring * p * sizes.trainable)
    teacher = ring * p * sizes.teacher * (accumulation if stage == 3 else 1)
    secondary = 0.0
    if stage == 3 and secondary_ranks is not None:
        parameters /= 2
        secondary = (secondary_ranks - 1) / secondary_ranks * p * everything * accumulation
    return Traffic(gradients, parameters, teacher, stage > 0, secondary)


def exposed_seconds(
    traffic: Traffic,
    compute: float,
    network: Network,
    *,
    stage: int,
    ranks: int,
    secondary_ranks: int | None = None,
) -> float:
    """Seconds by which communication lengthens a step of `compute` seconds."""
    speed = network.bytes_per_second(ranks)
    reduction, rest = traffic.gradients / speed, (traffic.parameters + traffic.teacher) / speed
    rest += traffic.secondary / network.bytes_per_second(secondary_ranks or ranks)
    if stage == 3:
        return max(0.0, reduction + rest - compute)
    return rest + (max(0.0, reduction - _BACKWARD * compute) if traffic.overlapped else reduction)

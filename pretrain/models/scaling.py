"""The paper's rules for choosing an InternImage (section 3.2), as functions. No torch.

Stacking: C_i = 2^(i-1) C1;  G_i = C_i / C';  L1 = L2 = L4;  L1 <= L3. Twelve hyper-parameters become four: (C1, C', L1,
    L3).
Scaling:  D = 3 L1 + L3 -> alpha^phi D,  C1 -> beta^phi C1,  alpha * beta^1.99 about 2.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pretrain.models.counting import parameters

ALPHA, BETA = 1.09, 1.36
BUDGET = 30e6  # parameters of every candidate
TOLERANCE = 0.10  # of the budget: a step of L3 at C1 = 80, C' = 16 is 5 % of it


@dataclass(frozen=True)
class Stack:
    """The four free hyper-parameters. The paper's origin, InternImage-T, is Stack(64, 16, 4, 18)."""

    channels: int
    group_width: int
    l1: int
    l3: int

    @property
    def depth(self) -> int:
        return 3 * self.l1 + self.l3

    def problem(self) -> str | None:
        """Why no model can be built of it; None where one can."""
        if self.channels % self.group_width:
            return f"C1 = {self.channels} is no whole number of groups of C' = {self.group_width}"
        if self.l1 > self.l3:
            return f"L1 = {self.l1} > L3 = {self.l3}"
        return None

    def arguments(self) -> dict[str, Any]:
        """Those of InternImage. ValueError where `problem` has one."""
        problem = self.problem()
        if problem:
            raise ValueError(problem)
        return {
            "channels": self.channels,
            "depths": (self.l1, self.l1, self.l3, self.l1),
            "groups": tuple(self.channels * 2**stage // self.group_width for stage in range(4)),
        }


ORIGIN = Stack(64, 16, 4, 18)


@dataclass(frozen=True)
class Candidate:
    """One of the search's 30: L3 is what brings the model nearest to the budget. `reason`: why it cannot be built."""

    stack: Stack
    parameters: int | None
    reason: str | None


def candidates() -> Iterator[Candidate]:
    """C1 in {48, 64, 80}, L1 in 1..5, C' in {16, 32}, each of about 30 M parameters."""
    for channels in (48, 64, 80):
        for l1 in range(1, 6):
            for group_width in (16, 32):
                yield _nearest(channels, l1, group_width)


def scale(phi: float, origin: Stack = ORIGIN, alpha: float = ALPHA, beta: float = BETA) -> Stack:
    """`origin` with alpha^phi times its depth and beta^phi times its width.

    The width is rounded to whole groups, the depth to a whole number; L1 keeps its share of it, and L3 takes the rest.
    """
    channels = max(1, round(origin.channels * beta**phi / origin.group_width)) * origin.group_width
    depth = round(origin.depth * alpha**phi)
    l1 = max(1, round(depth * origin.l1 / origin.depth))
    return Stack(channels, origin.group_width, l1, depth - 3 * l1)


def _nearest(channels: int, l1: int, group_width: int) -> Candidate:
    if channels % group_width:
        stack = Stack(channels, group_width, l1, l1)
        return Candidate(stack, None, stack.problem())
    count = {l3: parameters(Stack(channels, group_width, l1, l3).arguments()).total for l3 in range(l1, 80)}
    l3 = min(count, key=lambda depth: abs(count[depth] - BUDGET))
    reason = None
    if abs(count[l3] - BUDGET) > TOLERANCE * BUDGET:
        reason = f"with L3 = L1 = {l1}, the least allowed, it already has {count[l3] / 1e6:.1f} M parameters"
    return Candidate(Stack(channels, group_width, l1, l3), count[l3], reason)

"""The matrix products of an InternImage on the CPU: oneDNN (models/linear.py) against F.linear, GFLOP/s, one thread.

python benchmarks/models_linear.py

What models/linear.py chooses by the processor's vendor is not asked: both sides are measured on every x86.
"""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from pretrain.models.linear import OneDnnLinear

SHAPES = [(16384, 32, 128), (16384, 128, 32), (4096, 64, 256), (3136, 256, 64), (1024, 128, 512), (196, 256, 1024)]


def best(run: Callable[[], object], repeats: int = 15) -> float:
    run()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def speed(function: Callable[..., torch.Tensor], rows: int, inputs: int, outputs: int) -> tuple[float, float]:
    """GFLOP/s of the forward pass, and of forward and backward together."""
    x, cotangent = torch.randn(rows, inputs, requires_grad=True), torch.randn(rows, outputs)
    weight, bias = torch.randn(outputs, inputs, requires_grad=True), torch.randn(outputs, requires_grad=True)
    work = 2e-9 * rows * inputs * outputs

    def forward() -> None:
        with torch.no_grad():
            function(x, weight, bias)

    def step() -> None:
        torch.autograd.grad(function(x, weight, bias), (x, weight, bias), cotangent)

    return work / best(forward), 3 * work / best(step)


def main() -> None:
    torch.set_num_threads(1)
    print(f"{'rows, in, out':>18}   forward: F.linear  oneDNN  ratio   with backward: F.linear  oneDNN  ratio")
    for shape in SHAPES:
        plain, plain_step = speed(F.linear, *shape)
        fast, fast_step = speed(OneDnnLinear.apply, *shape)
        print(
            f"{shape!s:>18}   {plain:17.0f} {fast:7.0f} {fast / plain:6.2f}"
            f"   {plain_step:23.0f} {fast_step:7.0f} {fast_step / plain_step:6.2f}"
        )


if __name__ == "__main__":
    main()

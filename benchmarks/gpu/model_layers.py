"""The layers around the operator, alone: depthwise convolution, projections, LayerNorm and GELU of H, B and T.

    python benchmarks/gpu/model_layers.py H B T

At each stage's size for 224 px, bf16, channels last, forward and backward. One row a layer and direction: microseconds,
TFLOP/s, GB/s of what has to be read and written at least, and that as a share of what a copy on this GPU reaches.
The depthwise convolution is taken by cuDNN's first choice (as in training), by cuDNN's fastest, and by PyTorch's own
kernel; the projection to offsets and mask at its width of 27 a group and padded to multiples of 8 and 64.
On CUDA every figure is a graph of calls over inputs that together exceed the L2 cache several times.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from needs import packages
from record import headline, record, small
from torch import Tensor

STEP = "layers"
BATCH = {"T": 128, "B": 64, "H": 32}
L2_BYTES = 256 << 20  # inputs rotate through at least as many bytes
MOST_COPIES = 24
REPEATS = 7
Call = Callable[[], object]


@dataclass(frozen=True)
class Layer:
    """A layer at one size. make: gives the calls of one set of inputs: forward, backward. flops, bytes: of each."""

    name: str
    make: Callable[[], tuple[Call, Call]]
    flops: tuple[float, float]
    moved: tuple[float, float]
    note: str = ""


def depthwise(batch: int, side: int, channels: int, kernel: int, how: str, device: torch.device) -> Layer:
    def make() -> tuple[Call, Call]:
        x = random(device, batch, side, side, channels).permute(0, 3, 1, 2)
        weight, gradient = random(device, channels, 1, kernel, kernel), torch.randn_like(x)
        bias = random(device, channels)

        def forward() -> Tensor:
            with torch.backends.cudnn.flags(enabled=how != "native", benchmark=how == "cudnn fastest"):
                return F.conv2d(x, weight, bias, padding=kernel // 2, groups=channels)

        def backward() -> object:
            with torch.backends.cudnn.flags(enabled=how != "native", benchmark=how == "cudnn fastest"):
                two = [1, 1]
                pad = [kernel // 2] * 2
                return torch.ops.aten.convolution_backward(
                    gradient, x, weight, [channels], two, pad, two, False, [0, 0], channels, [True, True, True]
                )

        return forward, backward

    values = batch * side * side * channels
    work = 2.0 * values * kernel**2
    return Layer(f"depthwise {kernel}x{kernel}", make, (work, 2 * work), (4.0 * values, 6.0 * values), how)


def projection(name: str, rows: int, inputs: int, outputs: int, device: torch.device) -> Layer:
    def make() -> tuple[Call, Call]:
        x, weight, bias = random(device, rows, inputs), random(device, outputs, inputs), random(device, outputs)
        gradient = random(device, rows, outputs)
        return (
            partial(F.linear, x, weight, bias),
            lambda: (gradient @ weight, gradient.t() @ x, gradient.sum(0)),
        )

    work = 2.0 * rows * inputs * outputs
    moved = 2.0 * (rows * (inputs + outputs) + inputs * outputs)
    return Layer(name, make, (work, 2 * work), (moved, 2 * moved), f"{inputs} to {outputs}")


def layer_norm(rows: int, channels: int, device: torch.device) -> Layer:
    def make() -> tuple[Call, Call]:
        x, gradient = random(device, rows, channels), random(device, rows, channels)
        weight, bias = random(device, channels), random(device, channels)
        _, mean, scale = torch.native_layer_norm(x, [channels], weight, bias, 1e-6)
        return (
            partial(torch.native_layer_norm, x, [channels], weight, bias, 1e-6),
            lambda: torch.ops.aten.native_layer_norm_backward(
                gradient, x, [channels], mean, scale, weight, bias, [True, True, True]
            ),
        )

    values = rows * channels
    return Layer("LayerNorm", make, (0.0, 0.0), (4.0 * values, 6.0 * values))


def gelu(rows: int, channels: int, device: torch.device) -> Layer:
    def make() -> tuple[Call, Call]:
        x, gradient = random(device, rows, channels), random(device, rows, channels)
        return partial(F.gelu, x), partial(torch.ops.aten.gelu_backward, gradient, x)

    values = rows * channels
    return Layer("GELU", make, (0.0, 0.0), (4.0 * values, 6.0 * values), f"{channels} channels")


def random(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(*shape, device=device, dtype=torch.bfloat16)


def layers_of(batch: int, side: int, channels: int, groups: int, kernel: int, device: torch.device) -> list[Layer]:
    """Everything but the operator in a block of this stage."""
    rows, places = batch * side * side, 27 * groups
    padded = [math.ceil(places / multiple) * multiple for multiple in (8, 64)]
    ways = ("cudnn", "cudnn fastest", "native") if device.type == "cuda" else ("cudnn",)
    return [
        *(depthwise(batch, side, channels, kernel, how, device) for how in ways),
        projection("input_proj", rows, channels, channels, device),
        *(projection("offset, mask", rows, channels, width, device) for width in dict.fromkeys([places, *padded])),
        projection("fc1", rows, channels, 4 * channels, device),
        projection("fc2", rows, 4 * channels, channels, device),
        layer_norm(rows, channels, device),
        gelu(rows, channels, device),
        gelu(rows, 4 * channels, device),
    ]


def seconds(calls: Sequence[Call], device: torch.device) -> float:
    """Median of one call."""
    if device.type != "cuda":
        return statistics.median(spent(calls) for _ in range(2)) / len(calls)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(REPEATS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(times)


def spent(calls: Sequence[Call]) -> float:
    started = time.perf_counter()
    for call in calls:
        call()
    return time.perf_counter() - started


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of copying a tensor far larger than the L2 cache."""
    size = 1 << 29 if device.type == "cuda" else 1 << 22
    source = torch.zeros(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * size / seconds([lambda: target.copy_(source)], device)


def measure(layer: Layer, device: torch.device, bandwidth: float, about: dict[str, object]) -> dict[str, float]:
    """Records a row for each direction; microseconds of each."""
    copies = min(MOST_COPIES, max(2, math.ceil(L2_BYTES / layer.moved[0]))) if device.type == "cuda" else 1
    sets = [layer.make() for _ in range(copies)]
    found = {}
    for number, direction in enumerate(("forward", "backward")):
        row = {**about, "layer": layer.name, "note": layer.note, "direction": direction}
        try:
            took = seconds([calls[number] for calls in sets], device)
        except RuntimeError as error:
            record(STEP, {**row, "error": str(error).splitlines()[0]})
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            continue
        moved = layer.moved[number] / took
        found[direction] = 1e6 * took
        record(
            STEP,
            {
                **row,
                "us": round(1e6 * took, 2),
                "tflops": round(layer.flops[number] / took / 1e12, 2),
                "gb_s": round(moved / 1e9, 1),
                "of_copy": round(moved / bandwidth, 3),
            },
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=list(BATCH))
    parser.add_argument("--small", action="store_true", help="a batch of 1 at 32 px, narrow: does it run?")
    options = parser.parse_args()
    tiny = small()
    with packages(STEP), torch.inference_mode():
        from pretrain.models.variants import VARIANTS

        device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        bandwidth = copy_bandwidth(device)
        record(STEP, {"copy_gb_s": round(bandwidth / 1e9, 1)})
        words = [f"copy {bandwidth / 1e9:.0f} GB/s"]
        for letter in options.models:
            arguments = VARIANTS[f"internimage_{letter.lower()}"].arguments
            blocks: dict[str, float] = {}
            for stage in range(1 if tiny else 4):
                channels, groups = arguments["channels"] * 2**stage, arguments["groups"][stage]
                batch, side = (1, 8) if tiny else (BATCH[letter], 56 >> stage)
                about = {"model": letter, "stage": stage + 1, "batch": batch, "side": side, "channels": channels}
                kernel = arguments.get("dw_kernel_size") or 3
                for layer in layers_of(batch, side, channels, groups, kernel, device):
                    both = sum(measure(layer, device, bandwidth, about).values())
                    key = f"{layer.name} {layer.note}" if layer.name.startswith("depthwise") else layer.name
                    if stage == 2 or tiny:  # of what most blocks are
                        blocks.setdefault(key, both)
            longest = sorted(blocks, key=lambda name: -blocks[name])[:4]
            words.append(f"{letter} stage 3, us: " + ", ".join(f"{name} {blocks[name]:.0f}" for name in longest))
            headline(STEP, "; ".join(words))


if __name__ == "__main__":
    main()

"""The operator on a GPU: time, bytes a second beside the copy bandwidth, and ratios over other implementations.

    python benchmarks/operator_gpu.py                                    # every stage of T, B, L, H at 224 and 640 px
    python benchmarks/operator_gpu.py --models H --peer public=my_peers:dcnv3

A peer is a function (value, offset, mask_logits, groups) -> output, for 3 by 3 kernels, that autograd can go through;
build the public operator in your own environment and wrap it in one line. Contenders take turns; a ratio is the median
over the rounds, with quartiles. A turn is some 10 ms of calls between two events, replayed from a CUDA graph so that
Python's dispatch is no part of the time; what cannot be captured is called from Python, and its row says "calls".
A floor is every tensor moved once, at the measured copy bandwidth; a backward pass's time is that of both passes less
that of the forward. Results: benchmarks/results/operator_gpu.json.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import machine

from dcnv3 import available_backends, dcnv3

Operator = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]

# first stage's groups, channels of a group; each later stage has twice the groups on half the map
MODELS = {"T": (4, 16), "B": (7, 16), "L": (10, 16), "H": (10, 32)}
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def ours(value: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor, groups: int) -> torch.Tensor:
    return dcnv3(value, offset, mask, groups=groups, backend="cuda")


def by_deform_conv2d(value: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor, groups: int) -> torch.Tensor:
    """As a depthwise DCNv2 of ones; its points are h-major and its pairs (h, w)."""
    from torchvision.ops import deform_conv2d

    n, height, width, channels = value.shape
    points = offset.reshape(n, height, width, groups, 3, 3, 2).transpose(4, 5).flip(-1)
    weight = mask.reshape(n, height, width, groups, 9).softmax(-1).view(n, height, width, groups, 3, 3).transpose(4, 5)
    return deform_conv2d(
        value.permute(0, 3, 1, 2).contiguous(),
        points.reshape(n, height, width, -1).permute(0, 3, 1, 2).contiguous(),
        torch.ones(channels, 1, 3, 3, dtype=value.dtype, device=value.device),
        padding=1,
        mask=weight.reshape(n, height, width, -1).permute(0, 3, 1, 2).contiguous(),
    ).permute(0, 2, 3, 1)


def milliseconds(run: Callable[[], Any], calls: int) -> float:
    """Of one call, from `calls` of them between two events."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls


def calls_for(one: float, turn: float = 10.0) -> int:
    """Calls that fill a turn of so many milliseconds where one takes `one`."""
    return max(1, min(1000, round(turn / max(one, 1e-3))))


def bytes_moved(value: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor) -> dict[str, int]:
    """The least bytes of each pass, at stride 1: every input read and every output written once."""
    inputs = sum(t.numel() * t.element_size() for t in (value, offset, mask))
    output = value.numel() * value.element_size()
    forward, backward = inputs + output, 2 * inputs + output
    return {"forward": forward, "backward": backward, "forward_backward": forward + backward}


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second of a large copy on the device, read and written."""
    source = torch.empty(1 << 28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = [milliseconds(lambda: target.copy_(source), 10) for _ in range(20)]
    return 2 * source.numel() / statistics.median(times[5:]) * 1e3


def captured(run: Callable[[], Any]) -> tuple[Callable[[], Any], str]:
    """(a replay of `run`, "graph"), or (`run`, "calls") where capture fails. RuntimeError where it cannot run."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:
        torch.cuda.synchronize()
        return run, "calls"
    return graph.replay, "graph"


def compare(run: Callable[[Operator], None], contenders: dict[str, Operator], rounds: int) -> dict[str, Any]:
    """Times by turns. A contender that fails (no such type, no memory) is recorded with its error and dropped."""
    result: dict[str, Any] = {}
    ready: dict[str, tuple[Callable[[], Any], int]] = {}
    for name, function in contenders.items():
        try:
            call, result[f"{name}_timed"] = captured(lambda function=function: run(function))
            milliseconds(call, 3)
            ready[name] = call, calls_for(milliseconds(call, 3))
        except RuntimeError as error:
            result[f"{name}_error"] = str(error).splitlines()[0]
    times: dict[str, list[float]] = {name: [] for name in ready}
    for turn in range(rounds + 1):
        for name, (call, calls) in ready.items():
            spent = milliseconds(call, calls)
            if turn > 0:
                times[name].append(spent)
    result |= {f"{name}_ms": round(statistics.median(spent), 4) for name, spent in times.items()}
    for name in times:
        if name != "ours" and "ours" in times:
            low, middle, high = statistics.quantiles([b / a for a, b in zip(times["ours"], times[name], strict=True)])
            result[f"over_{name}"] = round(middle, 2)
            result[f"over_{name}_quartiles"] = [round(low, 2), round(high, 2)]
    return result


def measure(
    contenders: dict[str, Operator], tensors: list[torch.Tensor], groups: int, rounds: int, bandwidth: float
) -> dict[str, Any]:
    """Each pass's times, and the share of the copy bandwidth (bytes a second) that ours comes to."""

    def forward(function: Operator) -> None:
        with torch.no_grad():
            function(tensors[0], tensors[1], tensors[2], groups)

    leaves = [t.detach().requires_grad_() for t in tensors]

    def both(function: Operator) -> None:
        torch.autograd.grad(function(leaves[0], leaves[1], leaves[2], groups), leaves, tensors[0])

    found: dict[str, dict[str, Any]] = {
        "forward": compare(forward, contenders, rounds),
        "forward_backward": compare(both, contenders, rounds),
    }
    spent = {name: numbers.get("ours_ms") for name, numbers in found.items()}
    if spent["forward"] and spent["forward_backward"]:
        found["backward"] = {"ours_ms": round(spent["forward_backward"] - spent["forward"], 4)}
    for name, moved in bytes_moved(tensors[0], tensors[1], tensors[2]).items():
        if found.get(name, {}).get("ours_ms", 0) > 0:
            rate = moved / found[name]["ours_ms"] * 1e3
            found[name]["share_of_copy_bandwidth"] = round(rate / bandwidth, 3)
    return found


def peer(text: str) -> tuple[str, Operator]:
    name, _, target = text.partition("=")
    module, _, function = target.partition(":")
    return name, getattr(importlib.import_module(module), function)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--sizes", nargs="+", type=int, default=[224, 640])
    parser.add_argument("--dtypes", nargs="+", default=list(TYPES), choices=list(TYPES))
    parser.add_argument("--batch", type=int, default=64, help="at 224 px; an eighth of it at 640")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--peer", action="append", default=[], type=peer, metavar="NAME=MODULE:FUNCTION")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "operator_gpu.json")
    options = parser.parse_args()
    reason = available_backends()["cuda"]
    if reason is not None:
        raise SystemExit(f"the CUDA kernels cannot run here: {reason}")
    device = torch.device("cuda", torch.cuda.current_device())
    contenders: dict[str, Operator] = {"ours": ours, "deform_conv2d": by_deform_conv2d, **dict(options.peer)}
    about = machine(device=str(device))
    bandwidth = copy_bandwidth(device)
    print(f"{torch.cuda.get_device_name(device)}: copies {bandwidth / 1e9:.0f} GB/s")
    rows = []
    for model in options.models:
        for image in options.sizes:
            batch = options.batch if image <= 224 else max(1, options.batch // 8)
            for dtype in options.dtypes:
                for stage in range(4):
                    first, group_channels = MODELS[model]
                    groups, size = first << stage, image // 4 >> stage
                    widths = (groups * group_channels, groups * 18, groups * 9)
                    tensors = [torch.randn(batch, size, size, w, device=device).to(TYPES[dtype]) for w in widths]
                    row: dict[str, Any] = {"model": model, "image": image, "stage": stage + 1, "dtype": dtype}
                    row |= {"batch": batch, "map": size, "groups": groups, "group_channels": group_channels}
                    row |= measure(contenders, tensors, groups, options.rounds, bandwidth)
                    rows.append(row)
                    print(json.dumps(row), flush=True)
    about["copy_gb_per_s"] = round(bandwidth / 1e9, 1)
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(
        json.dumps({"benchmark": "operator_gpu", "machine": about, "rows": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()

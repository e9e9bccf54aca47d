"""The operator on a GPU: time, bytes a second beside the copy bandwidth, and ratios over other implementations.

    python benchmarks/operator_gpu.py                                    # every stage of T, B, L, H at 224 and 640 px
    python benchmarks/operator_gpu.py --models H --peer public=my_peers:dcnv3

A peer is a function (value, offset, mask_logits, groups) -> output, for 3 by 3 kernels, that autograd can go through;
build the public operator in your own environment and wrap it in one line. Contenders take turns; a ratio is the median
over the rounds, with quartiles. A forward pass's floor is every tensor moved once, at the measured copy bandwidth.
Results: benchmarks/results/operator_gpu.json.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

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


def milliseconds(run: Callable[[], Any]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second of a large copy on the device, read and written."""
    source = torch.empty(1 << 28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = [milliseconds(lambda: target.copy_(source)) for _ in range(20)]
    return 2 * source.numel() / statistics.median(times[5:]) * 1e3


def compare(run: Callable[[Operator], None], contenders: dict[str, Operator], rounds: int) -> dict[str, Any]:
    """Times by turns. A contender that fails (no such type, no memory) is recorded with its error and dropped."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    errors: dict[str, str] = {}
    for turn in range(rounds + 3):
        for name, function in contenders.items():
            if name in errors:
                continue
            try:
                spent = milliseconds(lambda function=function: run(function))
            except RuntimeError as error:
                errors[name] = str(error).splitlines()[0]
                continue
            if turn >= 3:
                times[name].append(spent)
    result: dict[str, Any] = {f"{n}_ms": round(statistics.median(t), 4) for n, t in times.items() if t}
    result |= {f"{name}_error": error for name, error in errors.items()}
    for name in contenders:
        if name != "ours" and name not in errors and "ours" not in errors:
            low, middle, high = statistics.quantiles([b / a for a, b in zip(times["ours"], times[name], strict=True)])
            result[f"over_{name}"] = round(middle, 2)
            result[f"over_{name}_quartiles"] = [round(low, 2), round(high, 2)]
    return result


def measure(contenders: dict[str, Operator], tensors: list[torch.Tensor], groups: int, rounds: int) -> dict[str, Any]:
    def forward(function: Operator) -> None:
        with torch.no_grad():
            function(tensors[0], tensors[1], tensors[2], groups)

    def both(function: Operator) -> None:
        value, offset, mask = (t.detach().requires_grad_() for t in tensors)
        function(value, offset, mask, groups).backward(tensors[0])

    return {
        "forward": compare(forward, contenders, rounds),
        "forward_backward": compare(both, contenders, rounds),
    }


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
                    row |= measure(contenders, tensors, groups, options.rounds)
                    moved = sum(t.numel() * t.element_size() for t in (*tensors, tensors[0]))
                    if "ours_ms" in row["forward"]:
                        rate = moved / row["forward"]["ours_ms"] * 1e3
                        row["forward"]["share_of_copy_bandwidth"] = round(rate / bandwidth, 3)
                    rows.append(row)
                    print(json.dumps(row), flush=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    machine = {"gpu": torch.cuda.get_device_name(device), "copy_gb_per_s": round(bandwidth / 1e9, 1)}
    machine |= {"torch": torch.__version__, "commit": commit, "date": time.strftime("%Y-%m-%d")}
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(
        json.dumps({"benchmark": "operator_gpu", "machine": machine, "rows": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()

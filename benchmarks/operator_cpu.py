"""The operator on a CPU against the same operator by `F.grid_sample` and by `torchvision.ops.deform_conv2d`.

    python benchmarks/operator_cpu.py                 # two threads, about four minutes; prints ratios, writes results/

Contenders take turns of TURN_MS of calls, so that a noisy moment hits all of them; a ratio is the median over the
rounds of theirs / ours in a round, with its quartiles. All include the softmax; theirs take bfloat16 through float32.
Results: benchmarks/results/operator_cpu.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import machine
from torch.nn import functional as F

from dcnv3 import available_backends, dcnv3

TURN_MS = 25.0
# InternImage-T and -H at 224 px: (map, groups, channels of a group)
STAGES = {
    "T": [(56, 4, 16), (28, 8, 16), (14, 16, 16), (7, 32, 16)],
    "H": [(56, 10, 32), (28, 20, 32), (14, 40, 32), (7, 80, 32)],
}


def by_grid_sample(value: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor, groups: int) -> torch.Tensor:
    """DCNv3, 3 by 3, stride 1, padding 1, as one `F.grid_sample` over images and groups; bfloat16 through float32."""
    dtype = value.dtype
    value, offset, mask = value.float(), offset.float(), mask.float()
    n, height, width, channels = value.shape
    points = 9
    # points are w-major: k = i * 3 + j is column i, row j
    cell = torch.tensor([[i - 1, j - 1] for i in range(3) for j in range(3)], dtype=value.dtype)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    start = torch.stack([columns, rows], -1).to(value.dtype)[None, :, :, None, None]
    location = start + cell + offset.view(n, height, width, groups, points, 2)
    grid = (2 * location + 1) / torch.tensor([width, height], dtype=value.dtype) - 1
    grid = grid.permute(0, 3, 1, 2, 4, 5).reshape(n * groups, height * width, points, 2)
    images = value.view(n, height, width, groups, -1).permute(0, 3, 4, 1, 2).reshape(n * groups, -1, height, width)
    sampled = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    weight = mask.view(n, height * width, groups, points).softmax(-1).permute(0, 2, 1, 3)
    output = (sampled * weight.reshape(n * groups, 1, height * width, points)).sum(-1)
    return output.view(n, channels, height, width).permute(0, 2, 3, 1).contiguous().to(dtype)


def by_deform_conv2d(value: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor, groups: int) -> torch.Tensor:
    """The same as a depthwise DCNv2 of ones, with the points' order and the pairs' order changed to its own."""
    from torchvision.ops import deform_conv2d

    dtype = value.dtype
    value, offset, mask = value.float(), offset.float(), mask.float()
    n, height, width, channels = value.shape
    points = offset.view(n, height, width, groups, 3, 3, 2).transpose(4, 5).flip(-1)
    weight = mask.view(n, height, width, groups, 9).softmax(-1).view(n, height, width, groups, 3, 3).transpose(4, 5)
    return (
        deform_conv2d(
            value.permute(0, 3, 1, 2).contiguous(),
            points.reshape(n, height, width, -1).permute(0, 3, 1, 2).contiguous(),
            torch.ones(channels, 1, 3, 3, dtype=value.dtype),
            padding=1,
            mask=weight.reshape(n, height, width, -1).permute(0, 3, 1, 2).contiguous(),
        )
        .permute(0, 2, 3, 1)
        .to(dtype)
    )


CONTENDERS: dict[str, Callable[..., torch.Tensor]] = {
    "ours": lambda value, offset, mask, groups: dcnv3(value, offset, mask, groups=groups, backend="cpu"),
    "grid_sample": by_grid_sample,
    "deform_conv2d": by_deform_conv2d,
}


def forward(function: Callable[..., torch.Tensor], tensors: list[torch.Tensor], groups: int) -> None:
    with torch.no_grad():
        function(*tensors, groups)


def forward_backward(function: Callable[..., torch.Tensor], tensors: list[torch.Tensor], groups: int) -> None:
    leaves = [t.detach().requires_grad_() for t in tensors]
    output = function(*leaves, groups)
    output.backward(tensors[0])


def compare(run: Callable[..., None], names: list[str], tensors: list[torch.Tensor], groups: int, rounds: int) -> Any:
    def turn(name: str, calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            run(CONTENDERS[name], tensors, groups)
        return (time.perf_counter() - start) * 1e3 / calls

    # The first round warms up and tells how many calls fill a turn: single calls of half a millisecond would measure
    # the caches and the threads as the contender before left them.
    calls = {name: max(1, round(TURN_MS / turn(name, 1))) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            times[name].append(turn(name, calls[name]))
    result: dict[str, Any] = {f"{name}_ms": round(statistics.median(t), 3) for name, t in times.items()}
    for name in names[1:]:
        ratios = sorted(theirs / ours for theirs, ours in zip(times[name], times["ours"], strict=True))
        low, _, high = statistics.quantiles(ratios, n=4)
        result[f"over_{name}"] = round(statistics.median(ratios), 2)
        result[f"over_{name}_quartiles"] = [round(low, 2), round(high, 2)]
    return result


def check_alike(tensors: list[torch.Tensor], groups: int) -> None:
    """All contenders compute the same, or the comparison means nothing."""
    ours = CONTENDERS["ours"](*tensors, groups).float()
    tolerance = 1e-3 if tensors[0].dtype == torch.float32 else 0.05
    for name, function in CONTENDERS.items():
        if float((function(*tensors, groups).float() - ours).abs().max()) > tolerance:
            raise RuntimeError(f"{name} does not compute what ours does")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9, help="rounds of T's stages; H's take a third")
    parser.add_argument("--models", nargs="+", default=list(STAGES), choices=list(STAGES))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "operator_cpu.json")
    options = parser.parse_args()
    reason = available_backends()["cpu"]
    if reason is not None:
        raise SystemExit(f"the CPU kernels are not here: {reason}")
    import dcnv3._C as kernels

    torch.set_num_threads(options.threads)
    about = machine("torchvision") | {"instructions": kernels.cpu_isa()}
    rows = []
    for model in options.models:
        for dtype in (torch.float32, torch.bfloat16):
            for size, groups, group_channels in STAGES[model]:
                torch.manual_seed(0)
                shape = (options.batch, size, size)
                tensors = [
                    torch.randn(*shape, width, dtype=dtype)
                    for width in (groups * group_channels, groups * 18, groups * 9)
                ]
                check_alike(tensors, groups)
                rounds = options.rounds if model == "T" else max(3, options.rounds // 3)
                row: dict[str, Any] = {"model": model, "dtype": str(dtype)[6:], "map": size, "groups": groups}
                row["group_channels"] = group_channels
                row["forward"] = compare(forward, list(CONTENDERS), tensors, groups, rounds)
                row["forward_backward"] = compare(forward_backward, list(CONTENDERS), tensors, groups, rounds)
                rows.append(row)
                ratios = [
                    f"{part} {key[5:]} x{row[part][key]:.1f} {row[part][key + '_quartiles']}"
                    for part in ("forward", "forward_backward")
                    for key in row[part]
                    if key.startswith("over_") and not key.endswith("quartiles")
                ]
                times = f"{row['forward']['ours_ms']:.2f} / {row['forward_backward']['ours_ms']:.2f} ms"
                head = f"{model} {row['dtype']:8} {size:2}x{size:<2} G={groups:<2} C'={group_channels}"
                print(f"{head}  {times}  {'; '.join(ratios)}", flush=True)
    options.out.parent.mkdir(exist_ok=True)
    report = {"benchmark": "operator_cpu", "batch": options.batch, "machine": about, "rows": rows}
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()

"""The operator beside torchvision's and, where --peers names a folder of wrappers, other public implementations.

A wrapper is a Python file in that folder, for 3 by 3 kernels:

    name = "public DCNv3"                                   # default: the file's
    activated = True                                        # it wants softmaxed masks, not logits; default: False
    def build(): ...                                        # optional: compile, import; called before any timing
    def operator(value, offset, mask, groups): ...          # -> output, through which autograd can go

All are built before anything is timed, and compared with ours on a small call; one that fails is recorded and left out.
A backward pass is the time of both passes less that of the forward.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cases import Case, Inputs, stages
from record import headline, record, small
from timing import compare, ratios

from dcnv3 import dcnv3

STEP = "beside"
Operator = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]


def ours(value: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor, groups: int) -> torch.Tensor:
    return dcnv3(value, offset, mask, groups=groups)


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


def with_softmax(operator: Operator) -> Operator:
    """An operator of activated masks as one of logits."""

    def call(value: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor, groups: int) -> torch.Tensor:
        return operator(value, offset, mask.unflatten(-1, (groups, -1)).softmax(-1).flatten(-2), groups)

    return call


def load(path: Path) -> tuple[str, Operator]:
    """The wrapper in a file, built. Whatever it raises passes through."""
    spec = importlib.util.spec_from_file_location(f"peer_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    if hasattr(module, "build"):
        module.build()
    operator = with_softmax(module.operator) if getattr(module, "activated", False) else module.operator
    return getattr(module, "name", path.stem), operator


def worst_difference(operator: Operator, device: torch.device, dtype: str) -> float:
    """Largest difference of output and gradients from ours on one small call, over ours' largest entry."""
    case = Case("T", 4, dtype, 1)
    inputs = case.inputs(device)
    results = []
    for function in (ours, operator):
        leaves = [t.detach().requires_grad_() for t in inputs[:3]]
        output = function(leaves[0], leaves[1], leaves[2], case.groups)
        results.append([output.detach(), *torch.autograd.grad(output, leaves, inputs.gradient)])
    return max(
        float((theirs.double() - own.double()).abs().max() / own.double().abs().max())
        for own, theirs in zip(*results, strict=True)
    )


def peers(folder: Path | None, device: torch.device) -> dict[str, Operator]:
    """Name -> operator of the wrappers that can be built and run; a row for each."""
    found: dict[str, Operator] = {}
    for path in sorted(folder.glob("*.py")) if folder else []:
        row: dict[str, Any] = {"peer": path.stem}
        try:
            name, operator = load(path)
            row["peer"], found[name] = name, operator
            for dtype in ("float32", "float16"):
                row[f"difference_{dtype}"] = round(worst_difference(operator, device, dtype), 6)
        except Exception as error:  # a peer may raise anything
            row["error"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        record(STEP, row)
    return found


def measure(case: Case, contenders: dict[str, Operator], device: torch.device, rounds: int) -> dict[str, Any]:
    """Pass -> contender -> times, and each contender's over ours."""

    def forward(function: Operator, i: Inputs) -> None:
        with torch.no_grad():
            function(i.value, i.offset, i.mask, case.groups)

    def both(function: Operator, i: Inputs) -> None:
        leaves = [t.detach().requires_grad_() for t in i[:3]]
        torch.autograd.grad(function(leaves[0], leaves[1], leaves[2], case.groups), leaves, i.gradient)

    rotation = case.rotation(device)
    found: dict[str, Any] = {}
    for name, run in (("forward", forward), ("forward_backward", both)):
        runs = {
            who: [lambda f=function, i=inputs, run=run: run(f, i) for inputs in rotation]
            for who, function in contenders.items()
        }
        found[name] = compare(runs, device, rounds, turn=4.0)
    found["backward"] = {
        who: {"ms": round(its["ms"] - found["forward"][who]["ms"], 5)}
        for who, its in found["forward_backward"].items()
        if "ms" in its and "ms" in found["forward"][who]
    }
    for name in list(found):
        found[f"{name}_over_ours"] = ratios(found[name])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tiny = small() or device.type != "cuda"
    contenders: dict[str, Operator] = {"ours": ours, **peers(options.peers, device)}
    # deform_conv2d takes a hundred times as long: one small call
    for dtype in ("float32",) if tiny else ("float16", "float32"):
        case = Case("T", 4 if tiny else 3, dtype, 1 if tiny else 4)
        found = measure(case, {**contenders, "deform_conv2d": by_deform_conv2d}, device, 2 if tiny else 5)
        record(STEP, case.about() | found)
        over = found["forward_backward_over_ours"].get("deform_conv2d")
        if over is not None:
            headline(STEP, f"deform_conv2d {over:.1f} times ours")
    if len(contenders) == 1 or tiny:
        return
    for dtype in ("float16", "bfloat16"):
        for case in stages(dtype):
            found = measure(case, contenders, device, 4)
            record(STEP, case.about() | found)
            if (case.model, case.stage) == ("T", 1) and found["forward_backward_over_ours"]:
                over = found["forward_backward_over_ours"]
                headline(STEP, f"T1 {dtype}: " + ", ".join(f"{who} {its:.2f} times ours" for who, its in over.items()))


if __name__ == "__main__":
    main()

"""The operator's passes at every stage of T and H: milliseconds, share of the copy bandwidth, points a second.

The compiled kernels and, by turns with them, Triton's; at the hottest stages of bf16 also the packed operator with a
centre, as the layer calls it. A pass's floor is every tensor moved once at the bandwidth of a
copy; the share is that floor over the time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from cases import MODELS, SPREAD, Case, Inputs, stages
from record import headline, record, small
from timing import compare, copy_bandwidth

import dcnv3

STEP = "kernels"
HOT = [("T", 1), ("H", 3)]
Pass = Callable[[Case, Inputs], object]


def forward(case: Case, i: Inputs) -> object:
    return torch.ops.dcnv3.forward(i.value, i.offset, i.mask, *case.geometry)


def backward(case: Case, i: Inputs) -> object:
    return torch.ops.dcnv3.backward(i.gradient, i.value, i.offset, i.mask, *case.geometry, False)


def deterministic_backward(case: Case, i: Inputs) -> object:
    return torch.ops.dcnv3.backward(i.gradient, i.value, i.offset, i.mask, *case.geometry, True)


def packed_forward(case: Case, i: Inputs) -> object:
    return torch.ops.dcnv3.packed_forward(i.value, i.packed, *case.geometry, True)


def packed_backward(case: Case, i: Inputs) -> object:
    return torch.ops.dcnv3.packed_backward(i.gradient, i.value, i.packed, *case.geometry, True, False)


def triton_passes() -> dict[str, Pass]:
    """Pass -> Triton's kernel, also where the compiled kernels take its place; none where it cannot run."""
    try:
        from dcnv3 import triton_kernels
    except ImportError:
        return {}
    return {
        "forward": lambda case, i: triton_kernels.forward(i.value, i.offset, i.mask, *case.geometry),
        "backward": lambda case, i: triton_kernels.backward(
            i.gradient, i.value, i.offset, i.mask, *case.geometry, False
        ),
    }


def measure(
    case: Case, contenders: dict[str, dict[str, Pass]], rotation: list[Inputs], bandwidth: float, rounds: int
) -> dict[str, Any]:
    """Pass -> contender -> times, with ours beside the floor. `contenders`: pass -> name -> what to call."""
    device = rotation[0].value.device
    found: dict[str, Any] = {}
    for name, passes in contenders.items():
        runs = {
            who: [lambda call=call, inputs=inputs: call(case, inputs) for inputs in rotation]
            for who, call in passes.items()
        }
        found[name] = compare(runs, device, rounds, turn=8.0 if device.type == "cuda" else 1.0)
        for its in found[name].values():
            if "ms" in its:
                floor = case.bytes_moved()[name.removeprefix("deterministic ")] / bandwidth * 1e3
                its["share_of_copy_bandwidth"] = round(floor / its["ms"], 3)
                its["billions_of_points_a_second"] = round(case.points / its["ms"] / 1e6, 3)
    return found


def words(case: Case, found: dict[str, Any]) -> str:
    said = [f"{case.model}{case.stage} {case.dtype}"]
    for name, its in found.items():
        ours = its["ours"]
        said.append(
            f"{name} {ours['ms']:.3f} ms {ours['share_of_copy_bandwidth']:.0%}" if "ms" in ours else f"{name} -"
        )
    return " ".join(said)


def plan(tiny: bool) -> list[tuple[Case, float, bool]]:
    """(case, spread of the offsets, whether Triton runs beside): the hottest stages of bf16 first."""
    if tiny:
        return [(Case("T", 4, "float32", 1), SPREAD, False), (Case("H", 4, "bfloat16", 1), 0.0, False)]
    hot = [(model, stage, MODELS[model][2]) for model, stage in HOT]
    rows = [(case, SPREAD, True) for case in stages("bfloat16")]
    rows += [(Case(model, stage, "bfloat16", batch), 0.0, False) for model, stage, batch in hot]
    rows += [(Case(model, stage, "float32", batch), SPREAD, True) for model, stage, batch in hot]
    return rows + [(case, SPREAD, False) for case in stages("float16")]


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tiny = small() or device.type != "cuda"
    bandwidth = copy_bandwidth(device, 1 << 22 if tiny else 1 << 30)
    backend = dcnv3.default_backend(device.type)
    record(STEP, {"backend": backend, "copy_gb_per_s": round(bandwidth / 1e9, 1)})
    triton = triton_passes() if backend == "cuda" else {}
    said: list[str] = []
    failed: list[str] = []
    for case, spread, beside in plan(tiny):
        contenders: dict[str, dict[str, Pass]] = {"forward": {"ours": forward}, "backward": {"ours": backward}}
        if beside:
            for name, call in triton.items():
                contenders[name]["triton"] = call
        hot = (case.model, case.stage) in HOT and case.dtype == "bfloat16" and spread > 0
        if hot or tiny:
            contenders |= {"packed forward": {"ours": packed_forward}, "packed backward": {"ours": packed_backward}}
        if hot and backend == "cuda":
            contenders["deterministic backward"] = {"ours": deterministic_backward}
        found = measure(case, contenders, case.rotation(device, spread), bandwidth, 3 if tiny else 9)
        record(STEP, case.about() | {"offset_spread": spread} | found)
        failed += [f"{case}: {its['ours']['error']}" for its in found.values() if "error" in its["ours"]]
        if len(said) < 2:
            said.append(words(case, {name: found[name] for name in ("forward", "backward")}))
            headline(STEP, "; ".join(said))
    if failed:
        raise SystemExit(f"Error: {len(failed)} passes failed, first {failed[0]}")


if __name__ == "__main__":
    main()

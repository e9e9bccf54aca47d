"""Run by test_triton.py under TRITON_INTERPRET=1, which Triton reads when it is imported: one JSON line a case."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch

from dcnv3 import triton_kernels
from dcnv3.geometry import make_geometry
from dcnv3.reference import packed_reference

HERE = Path(__file__).parent


def load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def computed(tensors: list[torch.Tensor], cotangent: torch.Tensor, options: dict[str, Any]) -> list[torch.Tensor]:
    geometry = make_geometry(**options)
    output = triton_kernels.forward(*tensors, *geometry)
    return [output, *triton_kernels.backward(cotangent.to(output.dtype), *tensors, *geometry, False)]


def tell(case: str, have: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    """The largest difference of each tensor, over its largest entry where that is above 1."""
    errors = []
    for h, w in zip(have, want, strict=True):
        largest = max(float(w.abs().max()), 1.0) if w.numel() else 1.0
        errors.append(float((h.double() - w.double()).abs().max()) / largest if w.numel() else 0.0)
        assert h.shape == w.shape and bool(torch.isfinite(h).all()), case
    print(json.dumps({"case": case, "errors": errors}))


def golden(folder: Path) -> None:
    from safetensors.torch import load_file

    fill = load(folder / "fill.py").uniform
    for path in sorted(folder.glob("op_*.json")):
        c = json.loads(path.read_text())
        points, rows = c["kernel_size"] ** 2 - c["remove_center"], (c["batch"], c["out_height"], c["out_width"])
        channels = c["groups"] * c["group_channels"]

        def tensor(key: str, shape: tuple[int, ...], amplitude: float = 1.0) -> torch.Tensor:
            return torch.from_numpy(fill(key, shape)).float() * amplitude

        tensors = [
            tensor("value", (c["batch"], c["height"], c["width"], channels)),
            tensor("offset", (*rows, c["groups"] * points * 2), c["offset_amplitude"]),
            tensor("mask_logits", (*rows, c["groups"] * points), c["mask_logit_amplitude"]),
        ]
        keys = ("groups", "kernel_size", "stride", "padding", "dilation", "offset_scale", "remove_center")
        have = computed(tensors, tensor("cotangent", (*rows, channels)), {key: c[key] for key in keys})
        want = load_file(path.with_suffix(".safetensors"))
        tell(path.stem, have, [want[key] for key in ("output", "grad_value", "grad_offset", "grad_mask_logits")])


def random(cases: list[dict[str, Any]]) -> None:
    for case in cases:
        call = load(HERE / "conftest.py").random_call(**case | {"dtype": getattr(torch, case["dtype"])})
        have = computed([call.value, call.offset, call.mask], call.cotangent, call.options)
        tell(str(case), have, list(call.run("reference", "cpu", torch.float64).values()))
        for center in (False, True):
            geometry = make_geometry(**call.options)
            if center and call.cotangent.shape != call.value.shape:
                continue
            further = torch.randn(*call.mask.shape[:3], geometry.groups * center + 3).to(call.mask)
            leaves = call.value, torch.cat([call.offset, call.mask, further], -1)
            output = triton_kernels.packed_forward(*leaves, *geometry, center)
            grads = triton_kernels.packed_backward(call.cotangent, *leaves, *geometry, center, False)
            exact = [t.double().requires_grad_() for t in leaves]
            want = packed_reference(*exact, geometry, center)
            wanted = [want.detach(), *torch.autograd.grad(want, exact, call.cotangent.double())]
            tell(f"packed, {center=}, {case}", [output, *grads], wanted)


if __name__ == "__main__":
    torch.set_num_threads(1)
    golden(HERE.parent / "golden")
    random(json.loads(sys.argv[1]))

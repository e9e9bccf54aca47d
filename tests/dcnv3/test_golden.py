"""The golden numbers of the public code: output and gradients to 1e-5, on every backend."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dcnv3 import dcnv3

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = sorted(path.stem for path in GOLDEN.glob("op_*.json"))


def rule() -> Any:
    spec = importlib.util.spec_from_file_location("golden_fill", GOLDEN / "fill.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_all_five_cases_are_here() -> None:
    assert len(CASES) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_are_those_of_the_public_code(
    case: str, dtype: torch.dtype, backend: tuple[str, str]
) -> None:
    name, device = backend
    c = json.loads((GOLDEN / f"{case}.json").read_text())
    expected = load_file(GOLDEN / f"{case}.safetensors")
    fill = rule().uniform
    points = c["kernel_size"] ** 2 - int(c["remove_center"])
    rows = (c["batch"], c["out_height"], c["out_width"])

    def leaf(key: str, shape: tuple[int, ...], amplitude: float = 1.0) -> torch.Tensor:
        numbers = fill(key, shape).astype(np.float64) * amplitude
        return torch.from_numpy(numbers).to(device, dtype).requires_grad_()

    value = leaf("value", (c["batch"], c["height"], c["width"], c["groups"] * c["group_channels"]))
    offset = leaf("offset", (*rows, c["groups"] * points * 2), c["offset_amplitude"])
    logits = leaf("mask_logits", (*rows, c["groups"] * points), c["mask_logit_amplitude"])
    keys = ("groups", "kernel_size", "stride", "padding", "dilation", "offset_scale", "remove_center")
    output = dcnv3(value, offset, logits, **{key: c[key] for key in keys}, backend=name)
    (output * leaf("cotangent", tuple(output.shape)).detach()).sum().backward()
    actual = {
        "output": output.detach(),
        "grad_value": value.grad,
        "grad_offset": offset.grad,
        "grad_mask_logits": logits.grad,
    }
    for key, tensor in actual.items():
        assert tensor is not None
        torch.testing.assert_close(
            tensor.cpu().double(), expected[key].double(), atol=1e-5, rtol=0, msg=lambda m, k=key: f"{k}: {m}"
        )

"""What the operator's tests share: the backends that run here, and one random call in any shape.

    pytest tests/dcnv3 -m gpu                        everything that touches a GPU, through the compiled kernels
    DCNV3_TEST_TRITON=1 pytest tests/dcnv3 -m gpu    the same through Triton's, as where no CUDA kernels were built

torch, numpy, safetensors, pytest and hypothesis are enough for both.
"""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for emulated

TRITON_ALONE = os.environ.get("DCNV3_TEST_TRITON") == "1"
if TRITON_ALONE:
    sys.modules["dcnv3._C_cuda"] = None  # type: ignore[assignment]  # an import of it fails

from emulated import compiled  # noqa: E402

from dcnv3 import available_backends, dcnv3  # noqa: E402

torch.backends.cudnn.allow_tf32 = False  # float32 is compared to more digits than TF32 has

BACKENDS = [("cpu", "cpu"), ("cuda", "cuda"), ("triton", "cuda")]
BACKENDS = [(name, device) for name, device in BACKENDS if available_backends()[name] is None]
BACKENDS += [("reference", "cpu")] + [("reference", "cuda")] * (torch.cuda.is_available() and not TRITON_ALONE)
GPU_KERNELS = [(name, device) for name, device in BACKENDS if device == "cuda" and name != "reference"]


def on(device: str) -> list[pytest.MarkDecorator]:
    """The marks of a parameter that makes a test use the device."""
    return [pytest.mark.gpu] if device == "cuda" else []


@pytest.fixture(params=[pytest.param(pair, marks=on(pair[1]), id=f"{pair[0]}-on-{pair[1]}") for pair in BACKENDS])
def backend(request: pytest.FixtureRequest) -> tuple[str, str]:
    """(backend, device) for each backend that runs on this machine."""
    return request.param


@pytest.fixture(
    params=[pytest.param(pair, marks=on(pair[1]), id=pair[0]) for pair in BACKENDS if pair[0] != "reference"]
)
def kernel(request: pytest.FixtureRequest) -> tuple[str, str]:
    """(backend, device) for each compiled backend that runs on this machine."""
    return request.param


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.gpu) for name, _ in GPU_KERNELS])
def gpu_kernel(request: pytest.FixtureRequest) -> str:
    """The backend of the GPU's kernels; skipped where there are none."""
    return request.param


@pytest.fixture(params=[pytest.param(name, marks=on(name)) for name in ["cpu"] + ["cuda"] * bool(GPU_KERNELS)])
def device(request: pytest.FixtureRequest) -> str:
    """The CPU, and a GPU where there is one with its kernels."""
    return request.param


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[int, ctypes.CDLL]:
    """The CUDA kernels for the CPU, before sm_90 and on it; skipped without a compiler."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # one compilation for all workers
        folder = folder.parent
    return compiled(folder / "emulation")


@dataclass
class Call:
    """Tensors and options of one call; `run` gives the output and the three gradients, as float64 on the CPU."""

    value: torch.Tensor
    offset: torch.Tensor
    mask: torch.Tensor
    cotangent: torch.Tensor
    options: dict[str, Any] = field(default_factory=dict)

    def leaves(self, device: str = "cpu", dtype: torch.dtype | None = None) -> list[torch.Tensor]:
        """Value, offset and mask anew, asking for gradients."""
        return [t.detach().to(device, dtype).requires_grad_() for t in (self.value, self.offset, self.mask)]

    def run(self, backend: str, device: str = "cpu", dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        leaves = self.leaves(device, dtype)
        output = dcnv3(*leaves, **self.options, backend=backend)
        output.backward(self.cotangent.to(device, dtype))
        names = ("output", "grad_value", "grad_offset", "grad_mask")
        tensors = (output, *(leaf.grad for leaf in leaves))
        return {name: t.detach().double().cpu() for name, t in zip(names, tensors, strict=True)}


@pytest.fixture
def make_call() -> Any:
    return random_call


def random_call(
    *,
    batch: int = 2,
    height: int = 6,
    width: int = 7,
    groups: int = 2,
    group_channels: int = 16,
    kernel: tuple[int, int] = (3, 3),
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
    remove_center: bool = False,
    offset_amplitude: float = 2.0,
    logit_amplitude: float = 1.0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **options: Any,
) -> Call:
    """A call with normal values and uniform offsets of the amplitude."""
    generator = torch.Generator().manual_seed(seed)
    points = kernel[0] * kernel[1] - int(remove_center)
    sizes = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, p, d, k, s in zip((height, width), padding, dilation, kernel, stride, strict=True)
    ]

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    offset = torch.rand(batch, *sizes, groups * points * 2, generator=generator, dtype=torch.float64) * 2 - 1
    return Call(
        normal(batch, height, width, groups * group_channels),
        (offset * offset_amplitude).to(dtype),
        normal(batch, *sizes, groups * points) * logit_amplitude,
        normal(batch, *sizes, groups * group_channels),
        {
            "groups": groups,
            "kernel_size": kernel,
            "stride": stride,
            "padding": padding,
            "dilation": dilation,
            "remove_center": remove_center,
            **options,
        },
    )

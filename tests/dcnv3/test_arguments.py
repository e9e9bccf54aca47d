"""A wrong argument is a ValueError that names it, what it is and what was expected; the raw operator never crashes."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
import torch

from dcnv3 import DCNv3, available_backends, backends, dcnv3, default_backend


def arguments(**changes: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "value": torch.zeros(2, 6, 7, 16),
        "offset": torch.zeros(2, 6, 7, 36),
        "mask": torch.zeros(2, 6, 7, 18),
        "groups": 2,
    }
    return made | changes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"value": torch.zeros(6, 7, 16)}, r"value: expected 4 dimensions .*got shape \(6, 7, 16\)"),
        ({"value": torch.zeros(2, 6, 7, 15)}, r"value: channels must be .*groups=2, got shape \(2, 6, 7, 15\)"),
        ({"value": torch.zeros(2, 6, 7, 0)}, r"value: channels must be"),
        ({"value": torch.zeros(2, 0, 7, 16)}, r"value: expected a map of at least one pixel"),
        ({"value": torch.zeros(2, 6, 7, 16, dtype=torch.int32)}, r"value: expected float64.*got torch.int32"),
        ({"value": [1.0]}, r"value: expected a tensor, got list"),
        ({"offset": torch.zeros(2, 6, 7, 18)}, r"offset: expected shape \(2, 6, 7, 36\).*got \(2, 6, 7, 18\)"),
        ({"offset": torch.zeros(2, 5, 7, 36)}, r"offset: expected shape \(2, 6, 7, 36\).*got \(2, 5, 7, 36\)"),
        ({"offset": torch.zeros(2, 6, 7, 36).double()}, r"offset: expected the dtype of value, torch.float32"),
        ({"mask": torch.zeros(1, 6, 7, 18)}, r"mask: expected shape \(2, 6, 7, 18\).*got \(1, 6, 7, 18\)"),
        ({"mask": torch.zeros(2, 6, 7, 18, device="meta")}, r"mask: expected the device of value, cpu, got meta"),
        ({"value": torch.zeros(2, 6, 7, 16).to_sparse()}, r"value: expected a dense .*got a torch.sparse_coo one of 4"),
        (
            {"mask": torch.nested.nested_tensor([torch.zeros(6, 7, 18)] * 2)},
            r"mask: expected a dense .*got a nested one",
        ),
        ({"groups": 0}, r"groups: expected an integer of at least 1 .*, got 0"),
        ({"groups": "2"}, r"groups: expected an integer of at least 1 .*, got '2'"),
        ({"groups": 3}, r"value: channels must be .*groups=3"),
        ({"kernel_size": 0}, r"kernel_size: expected an integer of at least 1"),
        ({"kernel_size": (3, 3, 3)}, r"kernel_size: expected .*pair, got \(3, 3, 3\)"),
        ({"stride": 0}, r"stride: expected an integer of at least 1"),
        ({"padding": -1}, r"padding: expected an integer of at least 0"),
        ({"dilation": 1.5}, r"dilation: expected an integer"),
        ({"dilation": None}, r"dilation: expected an integer.*got None"),
        ({"stride": 2**70}, r"stride: expected an integer .*below 2\*\*31.*, got 1180591620717411303424"),
        ({"padding": (1, 2**31)}, r"padding: expected an integer .*got \(1, 2147483648\)"),
        ({"dilation": 2**30, "kernel_size": 4}, r"dilation: expected a kernel below 2\*\*31 pixels, got 1073741824"),
        ({"offset_scale": None}, r"offset_scale: expected a finite number, got None"),
        ({"offset_scale": "x"}, r"offset_scale: expected a finite number, got 'x'"),
        ({"offset_scale": float("nan")}, r"offset_scale: expected a finite number, got nan"),
        ({"offset_scale": -float("inf")}, r"offset_scale: expected a finite number, got -inf"),
        ({"offset_scale": 10**400}, r"offset_scale: expected a finite number, got 10000"),
        ({"remove_center": "no"}, r"remove_center: expected True or False, got 'no'"),
        ({"mask_activation": ["softmax"]}, r"mask_activation: expected one of .*, got \['softmax'\]"),
        ({"backend": ["cpu"]}, r"backend: expected auto or one of cpu, cuda, triton, reference, got \['cpu'\]"),
        ({"kernel_size": 9, "padding": 0}, r"value: a 6 by 7 map is smaller than the kernel 9 by 9"),
        ({"remove_center": True, "kernel_size": 2}, r"remove_center: needs an odd square kernel"),
        ({"mask_activation": "tanh"}, r"mask_activation: expected one of softmax, sigmoid, none, got 'tanh'"),
        ({"backend": "tpu"}, r"backend: expected auto or one of cpu, cuda, triton, reference, got 'tpu'"),
    ],
)
def test_a_wrong_argument_is_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        dcnv3(**arguments(**changes))


def test_a_backend_that_is_not_here_says_why() -> None:
    missing = [name for name, reason in available_backends().items() if reason is not None]
    for name in missing:
        with pytest.raises(ValueError, match=f"backend: {name} is not available: .+"):
            dcnv3(**arguments(backend=name))
    assert available_backends()["reference"] is None


def test_auto_says_once_why_it_takes_the_slow_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends._REASONS, "cpu", "its extension cannot be imported; reinstall it")
    monkeypatch.setattr(backends, "_WARNED", set())
    assert default_backend("cpu") == "reference"
    with pytest.warns(
        UserWarning, match=r"tensors on cpu go through the slow reference backend \(cpu: .*; reinstall it\)"
    ):
        dcnv3(**arguments(backend="auto"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dcnv3(**arguments())  # once is enough
        monkeypatch.setattr(backends, "_WARNED", set())
        dcnv3(**arguments(backend="reference"))  # asked for
        meta = {key: t.to("meta") if isinstance(t, torch.Tensor) else t for key, t in arguments().items()}
        dcnv3(**meta)  # a device that no kernels are for


def test_the_default_backend_is_the_best_one_that_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    for cpu, cuda, triton in itertools.product([None, "not here"], repeat=3):
        for name, reason in (("cpu", cpu), ("cuda", cuda), ("triton", triton)):
            monkeypatch.setitem(backends._REASONS, name, reason)
        assert default_backend("cpu") == ("reference" if cpu else "cpu")
        assert default_backend("cuda") == ("reference" if cuda and triton else "triton" if cuda else "cuda")
    assert default_backend("meta") == default_backend("mps") == "reference"


def test_a_backend_refuses_tensors_of_another_device() -> None:
    if available_backends()["cpu"] is not None:
        pytest.skip("the CPU kernels are not built here")
    meta = {key: t.to("meta") if isinstance(t, torch.Tensor) else t for key, t in arguments(backend="cpu").items()}
    with pytest.raises(ValueError, match="backend: cpu cannot take tensors on meta"):
        dcnv3(**meta)


def test_triton_takes_tensors_of_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends._REASONS, "triton", None)
    assert backends.choose("triton", "cuda") == "triton"
    with pytest.raises(ValueError, match="backend: triton cannot take tensors on cpu"):
        dcnv3(**arguments(backend="triton"))


@pytest.mark.parametrize(
    ("position", "replacement"),
    [
        (0, torch.zeros(2, 6, 7, 15)),
        (0, torch.zeros(6, 7, 16)),
        (0, torch.zeros(2, 0, 7, 16)),
        (1, torch.zeros(2, 6, 7, 35)),
        (1, torch.zeros(2, 6, 7, 36, dtype=torch.float64)),
        (2, torch.zeros(2, 6, 6, 18)),
        (3, 0),
        (4, -1),
        (6, 0),
        (14, 7),
    ],
)
def test_the_raw_operator_refuses_what_the_function_would(position: int, replacement: Any, device: str) -> None:
    def here(thing: Any) -> Any:
        return thing.to(device) if isinstance(thing, torch.Tensor) else thing

    raw: list[Any] = [*(here(thing) for thing in arguments().values()), 3, 3, 1, 1, 1, 1, 1, 1, 1.0, False, 0]
    assert torch.ops.dcnv3.forward(*raw).shape == (2, 6, 7, 16)
    raw[position] = here(replacement)
    with pytest.raises((RuntimeError, ValueError)):
        torch.ops.dcnv3.forward(*raw)
    with pytest.raises((RuntimeError, ValueError)):
        torch.ops.dcnv3.backward(torch.zeros(2, 6, 7, 16, device=device), *raw, False)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"channels": 15}, "channels: expected a positive multiple of groups=2, got 15"),
        ({"channels": "a"}, "channels: expected an integer of at least 1 .*, got 'a'"),
        ({"channels": 0}, "channels: expected an integer of at least 1 .*, got 0"),
        ({"groups": None}, "groups: expected an integer of at least 1 .*, got None"),
        ({"kernel_size": (3, 3)}, r"kernel_size: expected an integer of at least 1 .*, got \(3, 3\)"),
        ({"dw_kernel_size": "3"}, "dw_kernel_size: expected an integer of at least 1 .*, got '3'"),
        ({"stride": (1, 1)}, r"stride: expected an integer of at least 1 .*, got \(1, 1\)"),
        ({"padding": None}, "padding: expected an integer of at least 0 .*, got None"),
        ({"dilation": 1.0}, "dilation: expected an integer of at least 1 .*, got 1.0"),
        ({"offset_scale": float("nan")}, "offset_scale: expected a finite number, got nan"),
        ({"backend": "tpu"}, "backend: expected auto or one of cpu, cuda, triton, reference, got 'tpu'"),
        ({"backend": ["cpu"]}, r"backend: expected auto or one of cpu, cuda, triton, reference, got \['cpu'\]"),
        ({"dw_kernel_size": 4}, "dw_kernel_size: 4 cannot give the output size"),
        ({"center_feature_scale": True, "stride": 2}, "center_feature_scale: needs an output of the input's size"),
    ],
)
def test_a_layer_that_does_not_fit_together_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DCNv3(**({"channels": 16, "groups": 2} | options))


def test_a_layer_names_the_input_it_expected() -> None:
    with pytest.raises(ValueError, match=r"inputs: expected \[N, H, W, 16\], got shape \(1, 16, 5, 5\)"):
        DCNv3(16, 2)(torch.zeros(1, 16, 5, 5))
    with pytest.raises(ValueError, match=r"inputs: expected a tensor \[N, H, W, 16\], got list"):
        DCNv3(16, 2)([1.0])

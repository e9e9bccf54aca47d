"""The operator inside PyTorch's machinery, on each device: opcheck, compile, export, checkpointing, autocast, ONNX."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from dcnv3 import DCNv3, dcnv3

GEOMETRY = (2, 3, 3, 1, 1, 1, 1, 1, 1, 1.0, False, 0)


def layer(device: str = "cpu", **options: Any) -> DCNv3:
    """A layer whose points have left their places."""
    torch.manual_seed(0)
    made = DCNv3(16, 2, **options)
    torch.nn.init.normal_(made.offset.weight, std=0.3)
    return made.to(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_passes(dtype: torch.dtype, make_call: Any, device: str) -> None:
    call = make_call(group_channels=8, dtype=dtype)
    tensors = call.leaves(device)
    torch.library.opcheck(torch.ops.dcnv3.forward.default, (*tensors, *GEOMETRY))
    plain = [t.detach() for t in (call.cotangent.to(device, dtype), *tensors)]
    # backward has no derivative of its own, so only what applies to it
    torch.library.opcheck(
        torch.ops.dcnv3.backward.default,
        (*plain, *GEOMETRY, False),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


@pytest.mark.parametrize("backend", [None, "reference"])
def test_a_compiled_block_gives_the_eager_result_in_one_graph(backend: str | None, device: str) -> None:
    block = layer(device, backend=backend, center_feature_scale=True)
    inputs = torch.randn(2, 6, 7, 16, device=device)
    # "aot_eager" runs the whole of Dynamo and the autograd tracing; the code generator needs a compiler and minutes
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    results = []
    for run in (block, compiled):
        block.zero_grad()
        x = inputs.clone().requires_grad_()
        output = run(x)
        output.square().sum().backward()
        results.append([output.detach(), x.grad, *(p.grad.clone() for p in block.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1]) > 10
    for eager, other in zip(*results, strict=True):
        torch.testing.assert_close(other, eager, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_the_default_compiler_gives_the_eager_result(device: str) -> None:
    block = layer(device)
    inputs = torch.randn(2, 6, 7, 16, device=device)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(block, fullgraph=True)(inputs), block(inputs), atol=1e-5, rtol=1e-5)


def test_an_exported_block_gives_the_same_output_after_reloading(device: str) -> None:
    block = layer(device).eval()
    inputs = torch.randn(2, 6, 7, 16, device=device)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(block, (inputs,), dynamic_shapes=({0: batch},))
    assert any("dcnv3" in str(node.target) for node in exported.graph.nodes)
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    reloaded = torch.export.load(file).module()
    for n in (2, 5):
        x = torch.randn(n, 6, 7, 16, device=device)
        # the norm and the GELU of an exported program are PyTorch's own, which round elsewhere
        torch.testing.assert_close(reloaded(x), block(x), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(use_reentrant: bool, device: str) -> None:
    block = layer(device)
    grads = []
    for run in (block, lambda x: checkpoint(block, x, use_reentrant=use_reentrant)):
        block.zero_grad()
        x = torch.ones(1, 6, 7, 16, device=device).cumsum(1).requires_grad_()
        run(x).square().sum().backward()
        grads.append([x.grad, *(p.grad.clone() for p in block.parameters() if p.grad is not None)])
    for plain, other in zip(*grads, strict=True):  # a GPU adds up the value's gradient in any order
        torch.testing.assert_close(
            other, plain, atol=0 if device == "cpu" else 1e-4, rtol=0 if device == "cpu" else 1e-4
        )


def test_the_activated_mask_is_not_kept_for_backward(make_call: Any, device: str) -> None:
    """What autograd saves is the three inputs and nothing else."""
    leaves = make_call().leaves(device)
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(tuple(t.shape)), t)[1], lambda t: t):
        torch.ops.dcnv3.forward(*leaves, *GEOMETRY)
    assert kept == [tuple(t.shape) for t in leaves]


@pytest.mark.parametrize("raw", [False, True], ids=["function", "operator"])
def test_autocast_casts_to_its_dtype_and_back(make_call: Any, raw: bool, device: str) -> None:
    call = make_call()
    leaves = call.leaves(device)
    with torch.autocast(device, torch.bfloat16):
        mixed = (leaves[0], leaves[1].bfloat16(), leaves[2])
        output = torch.ops.dcnv3.forward(*mixed, *GEOMETRY) if raw else dcnv3(*mixed, **call.options)
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert all(leaf.grad is not None and leaf.grad.dtype == torch.float32 for leaf in leaves)
    with torch.autocast(device, torch.bfloat16):
        double = [leaf.detach().double() for leaf in leaves]
        assert dcnv3(*double, **call.options).dtype == torch.float64


def test_fake_and_meta_tensors_give_shapes(make_call: Any) -> None:
    call = make_call(stride=(2, 1), height=9)
    meta = [t.to("meta").requires_grad_() for t in (call.value, call.offset, call.mask)]
    output = dcnv3(*meta, **call.options)
    assert output.shape == call.cotangent.shape and output.device.type == "meta"
    with torch.device("meta"):
        assert DCNv3(16, 2)(torch.empty(2, 5, 5, 16)).shape == (2, 5, 5, 16)


def test_without_kernels_the_operator_computes_with_pytorch(make_call: Any) -> None:
    """The fallback that other devices get: forward and backward as registered for no device in particular."""
    from dcnv3.registration import _forward, fallback_backward

    call = make_call(dtype=torch.float64)
    expected = call.run("reference")
    tensors = (call.value, call.offset, call.mask)
    torch.testing.assert_close(_forward(*tensors, *GEOMETRY), expected["output"])
    for have, key in zip(
        fallback_backward(call.cotangent, *tensors, *GEOMETRY, False), list(expected)[1:], strict=True
    ):
        torch.testing.assert_close(have, expected[key])


def test_onnx_takes_the_definition_as_standard_operators(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    block = layer(backend="reference").eval()
    inputs = torch.randn(1, 5, 6, 16)
    path = tmp_path / "block.onnx"
    torch.onnx.export(block, (inputs,), str(path), dynamo=True, verbose=False)
    assert {node.domain for node in onnx.load(path).graph.node} <= {"", "pkg.onnxscript.torch_lib.common"}
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    actual = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(actual), block(inputs).detach(), atol=1e-4, rtol=1e-4)

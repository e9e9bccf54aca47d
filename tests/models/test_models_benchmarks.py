"""The benchmarks of the models run and write what they promise; their figures are for idle machines alone."""

import copy
import json
import time
from pathlib import Path

import pytest
import torch
from torch import nn


@pytest.fixture
def load_gpu_step(load_benchmark, monkeypatch):
    """The name of a script in benchmarks/gpu/ -> it as a module."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks" / "gpu")
    return load_benchmark


def test_a_step_moves_the_weights_as_plain_adamw_does(load_gpu_step):
    step = load_gpu_step("model_step").ModelStep(
        nn.Sequential(nn.Flatten(), nn.Linear(48, 1000)), 4, 4, torch.device("cpu")
    )
    linear = copy.deepcopy(step.model[1])
    plain = torch.optim.AdamW(linear.parameters(), lr=1e-6, weight_decay=0.05)
    for _ in range(3):
        plain.zero_grad()
        nn.functional.cross_entropy(linear(step.images.flatten(1)), step.labels).backward()
        nn.utils.clip_grad_norm_(linear.parameters(), 1.0)
        plain.step()
        step()
    for found, expected in zip(step.model[1].parameters(), linear.parameters(), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-8, rtol=0)  # three steps of 1e-6 lie between


def test_offsets_are_spread_over_a_pixel_and_nothing_else_moves(load_gpu_step):
    module = load_gpu_step("model_step")
    model = module.internimage("T", torch.device("cpu"), tiny=True)
    biases = [p for name, p in model.named_parameters() if "offset" in name and name.endswith("bias")]
    assert biases and 0.8 < torch.cat(biases).std() < 1.2
    gamma = [p for name, p in model.named_parameters() if name.endswith("norm.weight")]
    assert all(torch.equal(p, torch.ones_like(p)) for p in gamma)


def test_turns_give_one_time_a_contender_and_turn(load_gpu_step):
    module = load_gpu_step("model_step")
    called: list[str] = []

    class Sleeper:
        device = torch.device("cpu")

        def __init__(self, name, seconds):
            self.name, self.seconds = name, seconds

        def __call__(self):
            called.append(self.name)
            time.sleep(self.seconds)

    spent = module.take_turns({"short": Sleeper("short", 0.001), "long": Sleeper("long", 0.02)}, turns=2, steps=2)
    assert called == ["short", "short", "long", "long"] * 2
    assert min(spent["long"]) >= 0.02 and len(spent["long"]) == 2
    assert module.summary(spent["long"], batch=10)["images_per_second"] < 500


def test_a_trace_is_summed_by_kernel_and_overlap_counts_once(load_gpu_step, tmp_path, monkeypatch):
    module = load_gpu_step("model_trace")
    monkeypatch.setenv("CHECK_OUT", str(tmp_path / "results.json"))

    def event(name, category, start, length):
        return {"ph": "X", "name": name, "cat": category, "ts": start, "dur": length}

    events = [
        event("void ns::gemm<float, 4>(int)", "kernel", 0, 600),
        event("void ns::gemm<float, 4>(int)", "kernel", 500, 200),
        event("Memcpy DtoD", "gpu_memcpy", 2000, 200),
        event("ProfilerStep", "gpu_user_annotation", 0, 9000),
        event("cudaLaunchKernelExC", "cuda_runtime", 0, 1),
        event("cudaMemcpyAsync", "cuda_runtime", 0, 1),
    ]
    words = module.summarize("H", 2, 2.0, events, cuda=True)
    rows = json.loads((tmp_path / "results.json").read_text())["steps"]["trace"]["rows"]
    assert rows[0]["kernels"] == 3 and rows[0]["launches"] == 1 and rows[0]["kernel_ms"] == 1.0
    assert rows[0]["busy"] == 0.5 and rows[0]["covered_ms"] == 0.9 and rows[0]["profiled_ms"] == 2.2
    assert [(row["kernel"], row["calls"], row["share"]) for row in rows[1:]] == [
        ("void ns::gemm<float, 4>(int)", 2, 0.8),
        ("Memcpy DtoD", 1, 0.2),
    ]
    assert rows[0]["ms_by_kind"] == {"matrix product": 0.8, "copy": 0.2}
    assert words == "H: 2 ms, 3 kernels, busy 50%: matrix product 80%, copy 20%"


GEMM = "nvjet_sm90_tst_256x128_64x4_1x2_h_bz_"
ATEN = "void at::native::"


@pytest.mark.parametrize(
    ("name", "kind", "short"),
    [
        (f"{GEMM}coopA_bias_TNT", "matrix product", f"{GEMM}coo"),
        ("void dcnv3::gpu::backward_kernel<float, 8>(dcnv3::gpu::Arguments)", "dcnv3 backward", "backward_kernel"),
        (f"{ATEN}(anonymous namespace)::layer_norm_kernel<float>(int)", "layer norm", "layer_norm_kernel"),
        (f"{ATEN}reduce_kernel<128, 4, at::native::ReduceOp<float> >(int)", "reduction", "reduce_kernel"),
        (f"{ATEN}elementwise_kernel<8, at::native::CUDAFunctor_add<float> >(int)", "addition", "elementwise_kernel"),
        ("wgrad2d_c1_k1_nhwc", "depthwise convolution", "wgrad2d_c1_k1_nhwc"),
        ("triton_red_fused_native_layer_norm_3", "compiled", "triton_red_fused_native_layer_norm_3"),
        ("something new", "other", "something new"),
    ],
)
def test_a_kernel_is_told_by_its_name(load_gpu_step, name, kind, short):
    kinds = load_gpu_step("kernel_kinds")
    assert kinds.kind(name) == kind and kinds.short(name) == f"{kind} ({short})"


def test_the_cpu_benchmark_gives_ratios_with_quartiles(load_benchmark, tmp_path, monkeypatch):
    benchmark = load_benchmark("models_cpu")
    if benchmark.available_backends()["cpu"]:
        pytest.skip("the compiled CPU operator is not here")
    monkeypatch.setattr(benchmark, "NAMES", {"internimage_t": "internimage_t", "convnext_tiny": "test_convnext"})
    monkeypatch.setattr(benchmark.torch, "set_num_threads", lambda count: None)
    out = tmp_path / "models_cpu.json"
    benchmark.main(["--batch", "1", "--rounds", "3", "--size", "64", "--out", str(out)])
    found = json.loads(out.read_text())
    for kind in ("forward", "step"):
        low, high = found[kind]["convnext_tiny"]["quartiles"]
        assert low <= found[kind]["convnext_tiny"]["internimage_t_takes"] <= high
        assert found[kind]["internimage_t"]["quartiles"] == [1.0, 1.0]
    with pytest.raises(SystemExit):
        benchmark.main(["--rounds", "1"])

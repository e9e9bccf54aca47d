"""Launches, bytes and FLOPs of a step, against sums worked out by hand, closed forms and the profiler."""

import json
from collections import Counter as Multiset
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from dcnv3.fused import built
from launch.cli import run
from pretrain.analysis import traffic
from pretrain.configuration.schema import RecomputeBudget
from pretrain.models import InternImage
from pretrain.models.activations import image_activations
from pretrain.models.counting import multiply_adds

pytestmark = pytest.mark.skipif(not built("norm_forward", "cpu"), reason="the CPU kernels are not built here")

TINY: dict[str, Any] = {"channels": 32, "depths": (2, 1, 2, 1), "groups": (2, 4, 8, 16), "num_classes": 10}


def rows_of(arguments: dict[str, Any], size: int, batch: int = 2, **options: Any) -> dict[str, traffic.Row]:
    options = {"dtype": torch.bfloat16} | options
    return {row.part: row for row in traffic.step_costs(arguments, image_size=size, batch=batch, **options)}


def test_a_blocks_launches_and_bytes_are_those_of_a_derivation_by_hand() -> None:
    """Of a pre-norm block whose map is so large that its weights, biases and statistics weigh nothing.

    In maps, with p the columns of places over C. Each pair is (launches, maps moved).
    """
    p = 56 / 32  # 27 * 2 places, to a multiple of 8
    forward = {
        "norm": (1, 2),
        "input projection": (1, 2),
        "depthwise convolution": (1, 2),
        "its norm, with GELU": (1, 2),
        "weights and biases joined": (1, 0),
        "places": (1, 1 + p),
        "sampling": (1, 1 + p + 1),
        "output projection": (1, 2),
        "sum": (1, 3),
        "second norm": (1, 2),
        "fourfold layer": (1, 1 + 4),
        "its GELU": (1, 4 + 4),
        "and back": (1, 4 + 1),
        "second sum": (1, 3),
    }
    norm = (1, 3)  # with the sums for its weight and bias
    product = (3, 2 + 2 + 1)  # gradients of input, weight and bias, of equal widths
    backward = {
        "second layer": (3, (1 + 4) + (1 + 4) + 1),
        "its GELU": (1, 4 + 4 + 4),
        "first layer": (3, (4 + 1) + (4 + 1) + 4),
        "second norm, with the sum's gradient": (1, 3 + 1),
        "output projection": product,
        # points and tiles, which read the gradient and the places; an fp32 sum: zeroed, read, written, read
        "sampling": (4, (1 + 1 + p) + (1 + p) + (1 + p) + (2 + 2 + 2 + 2)),
        "places": (3, (p + 1) + (p + 1) + p),
        "norm of the convolution, with GELU": norm,
        "convolution": (3, 2 + 2 + 1),
        "input projection": product,
        "norm, with the gradients of the branch's second reader and of the sum": (1, 3 + 2),
    }
    block = rows_of({**TINY, "num_classes": 0}, 448, batch=4)["stage 1, a block"]
    assert sum(maps for _, maps in forward.values()) == 39 + 2 * p
    assert sum(maps for _, maps in backward.values()) == 78 + 6 * p
    counted = [*forward.values(), *backward.values()]
    assert block.cost.launches == sum(launches for launches, _ in counted)
    assert block.values == 4 * 112 * 112 * 32
    assert block.units == pytest.approx(sum(maps for _, maps in counted), rel=0.015)  # statistics in fp32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_flops_are_three_times_the_closed_forms(dtype: torch.dtype) -> None:
    arguments = {**TINY, "center_feature_scale": True}  # 28 columns of places a group: no padding
    step = rows_of(arguments, 64, batch=3, dtype=dtype)["step"].cost.flops
    first = 32 * 32 * 9 * 3 * 16  # the stem's first convolution has no gradient of its input
    assert step == 3 * 2 * (3 * multiply_adds(arguments, 64).total - first)


@pytest.mark.parametrize(
    "arguments",
    [TINY, {**TINY, "center_feature_scale": True, "res_post_norm": True, "drop_path_rate": 0.1, "dw_kernel_size": 5}],
    ids=["plain", "h_like"],
)
def test_operators_are_those_that_the_profiler_sees(arguments: dict[str, Any]) -> None:
    counter = traffic.Counter()
    model = InternImage(**arguments).to(torch.bfloat16)
    images = torch.randn(2, 3, 64, 64, dtype=torch.bfloat16)

    def step() -> None:
        model.zero_grad()
        output = model(images)
        output.backward(torch.ones_like(output))

    with counter:
        step()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step()
    # gradients are added in place where nobody watches
    seen = Multiset(event.name.replace("aten::add_", "aten::add") for event in profiled.events())
    # `aten` operators that others call inside too are left out: the profiler shows those calls
    inner = {"copy_", "_to_copy", "fill_", "zero_", "sum", "sub", "ones_like", "clone"}
    counted: Multiset[str] = Multiset()
    for name, calls in counter.operators.items():
        if name.split("::")[1] not in inner:
            counted[name.replace("aten::add_", "aten::add")] += calls
    assert len(counted) > 12 and counted["dcnv3::packed_backward"] == 6
    doubled = {"aten::convolution", "dcnv3::packed_forward"}  # shown once more from inside itself
    assert {name: seen[name] for name in counted if name not in doubled} == {
        name: calls for name, calls in counted.items() if name not in doubled
    }


def test_a_steps_rows_add_up_and_grow_with_the_batch() -> None:
    few, many = rows_of(TINY, 64), rows_of(TINY, 64, batch=8)
    parts = [few[name].cost for name in ("stem", "stage 1", "stage 2", "stage 3", "stage 4", "head")]
    assert sum(parts, traffic.Cost()) == few["step"].cost
    assert many["step"].cost.launches == few["step"].cost.launches
    assert many["step"].cost.flops == 4 * few["step"].cost.flops
    assert few["stage 1"].cost.flops > 2 * few["stage 1, a block"].cost.flops
    once, again = (rows_of(TINY, 64, recompute=what)["stage 3, a block"].cost.flops for what in ("none", "blocks"))
    last = 2 * 2 * 4 * 4 * 4 * 128**2  # the MLP's second product, which nothing backward needs
    assert again == 4 / 3 * once - last
    least, most = (image_activations(TINY, 64, checkpointing=on).peak for on in (True, False))
    budget = RecomputeBudget(budget_gb=(least + most) / 2 * 2 * 2 / 1e9)  # two images of 16 bits
    assert once <= rows_of(TINY, 64, recompute=budget)["stage 3, a block"].cost.flops < again


def test_the_command_counts_a_shipped_configuration(
    tiny_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(tiny_run())
    assert run(["inspect", "costs", config, "--batch", "2", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert (rows[0]["part"], rows[-1]["part"], len(rows)) == ("stem", "step", 11)
    assert run(["inspect", "costs", config, "data.image_size=64"]) == 0
    printed = capsys.readouterr().out
    assert "16 images of 64 px" in printed and "stage 4, a block" in printed

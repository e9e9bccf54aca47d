"""The plan's formulas against what PyTorch really keeps, and its arithmetic against numbers worked out by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.cli import run
from launch.machines import Machine
from launch.planning import count, plan_run
from pretrain.analysis import costs, plan
from pretrain.analysis.communication import Network, exposed_seconds, step_traffic
from pretrain.analysis.hardware import DEVICES, likely_share
from pretrain.configuration import load_config
from pretrain.models import create_model
from pretrain.models.activations import image_activations

BILLION = plan.Sizes(trainable=1_000_000_000, teacher=900_000_000)
# A whole teacher, and beside it what it is refreshed through: an eighth of the weights sent, 2 ** 25 values received.
WHOLE = 1.8 + 2 * (0.125 + 0.033554432)


def gigabytes(stage: int, ranks: int = 8, **options: Any) -> plan.Memory:
    return plan.rank_memory(BILLION, stage=stage, ranks=ranks, **({"precision": "bf16"} | options))


@pytest.mark.parametrize(
    ("stage", "parameters", "gradients", "optimizer", "teacher"),
    [(0, 2.0, 2.0, 12.0, WHOLE), (1, 2.0, 2.0, 1.5, WHOLE), (2, 2.0, 0.25, 1.5, WHOLE), (3, 0.25, 0.25, 1.5, 0.225)],
)
def test_a_billion_parameters_in_bf16_over_eight_ranks(
    stage: int, parameters: float, gradients: float, optimizer: float, teacher: float
) -> None:
    memory = gigabytes(stage)
    assert memory.parameters / 1e9 == pytest.approx(parameters)
    assert memory.gradients / 1e9 == pytest.approx(gradients)
    assert memory.optimizer / 1e9 == pytest.approx(optimizer)
    assert memory.teacher / 1e9 == pytest.approx(teacher)
    assert memory.average / 1e9 == pytest.approx(0.5)


def test_offloading_moves_bytes_and_loses_none() -> None:
    here, away = gigabytes(3), gigabytes(3, offload_optimizer=True, offload_parameters=True)
    assert away.host == pytest.approx(here.optimizer + here.parameters + here.average)
    assert away.states + away.host == pytest.approx(here.states)
    filed = gigabytes(3, offload_optimizer=True, offload_parameters=True, offload_folder=True)
    assert filed.files / 1e9 == pytest.approx((4 + 4 + 4) / 8), "two moments and the average, over eight ranks"
    assert filed.states + filed.host + filed.files == pytest.approx(here.states)


def test_an_asynchronous_checkpoint_keeps_a_copy_on_the_host_unless_the_states_are_in_files() -> None:
    assert gigabytes(1, asynchronous=True).host / 1e9 == pytest.approx(16 / 8)
    assert gigabytes(1, asynchronous=True, ema=False).host / 1e9 == pytest.approx(12 / 8)
    assert gigabytes(1, asynchronous=True).total == gigabytes(1).total
    assert gigabytes(1, asynchronous=True, offload_optimizer=True, offload_folder=True).host / 1e9 == pytest.approx(0.5)


def test_more_ranks_never_need_more_memory() -> None:
    for stage in plan.STAGES:
        totals = [gigabytes(stage, ranks).total for ranks in (1, 2, 4, 64)]
        assert totals == sorted(totals, reverse=True)


def test_nothing_is_planned_for_devices_that_nobody_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "internimage_h_m3i_427m", "--gpus", "128", "--samples", "1000"]) == 0
    shown = capsys.readouterr().out
    assert "name the devices (--gpu" in shown and "days" not in shown.lower().replace("days:", "")
    assert not any("  fits" in line for line in shown.splitlines())  # a cell of the table, as with a device
    assert "`internimage inspect loader`" in shown and run(["inspect", "loader", "--help"]) == 0
    capsys.readouterr()
    assert run(["plan", "internimage_h_m3i_427m", "--gpu", "m1", "--gpus", "128"]) == 2
    assert "known are v100, a100-40" in capsys.readouterr().err
    assert run(["plan", "internimage_h_m3i_427m", "--gpu", "v100", "--gpus", "128"]) == 2
    assert "v100 has no bf16" in capsys.readouterr().err
    assert run(["plan", "internimage_h_m3i_427m", "--memory", "80", "--gpus", "128"]) == 0
    assert "Days: name the devices (--gpu)" in capsys.readouterr().out


def test_an_a100_takes_as_much_longer_as_its_peak_is_lower(capsys: pytest.CaptureFixture[str]) -> None:
    days = {}
    for gpu in ("a100", "h100"):
        words = ["--gpus", "128", "--gpu", gpu, "--mfu", "0.3", "--samples", "427000000", "--json"]
        assert run(["plan", "internimage_h_m3i_427m", "training.zero_stage=3", *words]) == 0
        days[gpu] = json.loads(capsys.readouterr().out)["days"]
    assert days["a100"][0] == days["a100"][1] == pytest.approx(989 / 312 * days["h100"][0], rel=0.02)


def test_a_step_sends_what_zero_says() -> None:
    """A billion parameters in bf16, reduced in fp32, 8 ranks: 7/8 of 4 GB a scatter, of 2 GB a gather."""
    sizes = plan.Sizes(trainable=1_000_000_000, teacher=1_000_000_000)
    same = {"ranks": 8, "precision": "bf16", "reduction_bytes": 4.0}
    found = [step_traffic(sizes, stage=stage, **same) for stage in plan.STAGES]
    assert [round(one.gradients / 1e9, 3) for one in found] == [7.0, 3.5, 3.5, 3.5]
    assert [round(one.parameters / 1e9, 3) for one in found] == [0.0, 1.75, 1.75, 3.5]
    assert [round(one.teacher / 1e9, 3) for one in found] == [1.75] * 4
    twice = step_traffic(sizes, stage=2, accumulation=2, **same)
    assert twice.gradients == 2 * found[2].gradients and twice.parameters == found[2].parameters


def test_a_secondary_partition_costs_memory_and_keeps_traffic_in_the_node() -> None:
    """A billion parameters in bf16, 64 ranks, a second copy over the 8 of each node."""
    same = {"stage": 3, "ranks": 64, "precision": "bf16", "reduction_bytes": 4.0}
    plain, cut = (step_traffic(BILLION, **same, secondary_ranks=ranks) for ranks in (None, 8))
    assert cut.parameters == plain.parameters / 2 and cut.secondary == pytest.approx(7 / 8 * 2e9)
    network = Network(link=450, network=50, gpus_per_node=8)
    at = {"stage": 3, "ranks": 64}
    gained = exposed_seconds(plain, 0, network, **at) - exposed_seconds(cut, 0, network, **at, secondary_ranks=8)
    assert gained == pytest.approx(63 / 64 * 2 / 40 - 7 / 8 * 2 / 360)
    more = gigabytes(3, 64, secondary_ranks=8).parameters - gigabytes(3, 64).parameters
    assert more / 1e9 == pytest.approx(2 / 8)


def test_muon_keeps_one_moment() -> None:
    sizes = plan.Sizes(trainable=1_000_000_000, muon=750_000_000)
    of_muon = plan.rank_memory(sizes, stage=1, ranks=8, precision="bf16", asynchronous=True)
    of_adam = plan.rank_memory(plan.Sizes(1_000_000_000), stage=1, ranks=8, precision="bf16", asynchronous=True)
    assert (of_adam.optimizer - of_muon.optimizer) / 1e9 == pytest.approx(3 / 8)
    assert (of_adam.host - of_muon.host) / 1e9 == pytest.approx(3 / 8)
    assert plan.checkpoint_bytes(sizes, ema=True) / 1e9 == pytest.approx(13)


def test_what_the_backward_pass_hides_is_not_exposed() -> None:
    sizes = plan.Sizes(trainable=1_000_000_000)
    network = Network(link=450, network=400, gpus_per_node=8)
    traffic = [step_traffic(sizes, stage=s, ranks=16, precision="bf16", reduction_bytes=4.0) for s in plan.STAGES]
    exposed = [exposed_seconds(traffic[s], 1.0, network, stage=s, ranks=16) for s in plan.STAGES]
    assert exposed[0] == pytest.approx(2 * 15 / 16 * 4 / 320) and exposed[1] == pytest.approx(15 / 16 * 2 / 320)
    assert exposed[3] == 0 and exposed_seconds(traffic[3], 0.001, network, stage=3, ranks=16) > 0
    slow = exposed_seconds(traffic[1], 1e-9, network, stage=1, ranks=16)
    assert slow == pytest.approx(15 / 16 * (4 + 2) / 320, rel=1e-3)
    inside = exposed_seconds(traffic[0], 1.0, network, stage=0, ranks=8)
    assert inside < exposed[0], "NVLink is faster than the network"


def test_contrastive_logits_bound_the_micro_batch() -> None:
    import types

    from pretrain.objectives.contrastive import text_loss

    rows, images = 192, 2
    known = types.SimpleNamespace(
        tokens=torch.arange(4 * rows).view(rows, 4), has_text=torch.ones(rows, dtype=torch.bool)
    )
    metrics = types.SimpleNamespace(add=lambda name, value: None)
    scale = torch.tensor([10.0], requires_grad=True)
    pooled, text = torch.randn(images, rows, 8, requires_grad=True), torch.randn(rows, 8, requires_grad=True)
    kept = 4 * kept_values(lambda: text_loss(pooled, text, scale, known, metrics), [])  # type: ignore[arg-type]
    assert plan.contrastive_bytes(rows, 1, images) - 8 * rows**2 == pytest.approx(kept, rel=0.1)
    free = plan.largest_micro_batch(0, 1e6, 1e11)
    bound = plan.largest_micro_batch(0, 1e6, 1e11, ranks=1024, contrastive_images=2)
    used = 1e6 * bound + plan.contrastive_bytes(bound, 1024, 2)
    assert bound < free / 50 and used <= plan.RESERVE * 1e11 < used + 1e6 + plan.contrastive_bytes(2 * bound, 1024, 2)


def test_the_likely_share_of_the_peak_lies_about_the_measured_ones() -> None:
    assert likely_share(1.08e9)[0] < 0.189 < likely_share(1.08e9)[1]
    assert likely_share(1e6) == likely_share(30e6) and likely_share(97e6)[1] < likely_share(300e6)[1]
    assert all(device.half > device.single and device.memory > 0 for device in DEVICES.values())


def kept_values(call: Callable[[], Any], parameters: list[torch.nn.Parameter]) -> float:
    """Bytes of the distinct storages that autograd saves while `call` runs, parameters aside, over 4."""
    owned = {p.untyped_storage().data_ptr() for p in parameters}
    seen: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in owned:
            seen[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(tensor.untyped_storage().nbytes() for tensor in seen.values()) / 4


@pytest.mark.parametrize(
    "arguments",
    [
        {"depths": (2, 2, 4, 2)},
        {"depths": (2, 2, 4, 2), "post_norm": True, "layer_scale": 1e-5},
        {"depths": (2, 2, 4, 2), "share_weights": False, "remove_center": True},
        {"depths": (2, 2, 4, 2), "share_weights": False, "center_feature_scale": True},
        {
            "depths": (2, 2, 6, 2),
            "dw_kernel_size": 5,
            "use_clip_projector": True,
            "level2_post_norm": True,
            "level2_post_norm_block_ids": (5,),
            "center_feature_scale": True,
            "res_post_norm": True,
            "clip_embed_dim": 128,
        },
    ],
)
def test_image_activations_are_what_autograd_keeps(arguments: dict[str, Any]) -> None:
    model = create_model("custom", num_classes=0, channels=32, groups=(2, 4, 8, 16), drop_path_rate=0.1, **arguments)
    few, more = torch.randn(2, 3, 96, 96), torch.randn(4, 3, 96, 96)
    owned = list(model.parameters())
    # what two images more keep: the joined weights of the operators' products do not grow with the batch
    kept = (kept_values(lambda: model(more), owned) - kept_values(lambda: model(few), owned)) / 2
    planned = image_activations({**arguments, "channels": 32, "groups": (2, 4, 8, 16)}, 96, checkpointing=False)
    assert planned.kept == pytest.approx(kept, rel=0.05)


def test_transformer_activations_are_what_autograd_keeps() -> None:
    from timm.models.vision_transformer import Block

    block = torch.nn.Sequential(*(Block(64, 4, qkv_bias=True) for _ in range(2)))
    tokens = torch.randn(3, 50, 64, requires_grad=True)
    kept = kept_values(lambda: block(tokens), list(block.parameters())) / 3
    assert costs.transformer_activations(50, 64, 2, checkpointing=False).kept == pytest.approx(kept, rel=0.1)


def test_transformer_multiply_adds_are_what_torch_counts() -> None:
    from timm.models.vision_transformer import Block
    from torch.utils.flop_counter import FlopCounterMode

    block = torch.nn.Sequential(*(Block(64, 4, qkv_bias=True) for _ in range(3)))
    for layer in block:
        layer.attn.fused_attn = False  # the counter knows products, not every version's fused attention on a CPU
    with FlopCounterMode(display=False) as counter:
        block(torch.randn(1, 50, 64))
    assert costs.transformer_multiply_adds(50, 64, 3) == pytest.approx(counter.get_total_flops() / 2, rel=0.01)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("size", [{"name": "RN50"}, {"width": 64, "layers": 3, "heads": 2}])
def test_the_text_tower_counts_as_torch_counts_it(
    tiny_run: Callable[..., Path], size: dict[str, Any], frozen: bool
) -> None:
    """Given by sizes or by the name of an open_clip model; trained three times forward, frozen once."""
    from torch.utils.flop_counter import FlopCounterMode

    from pretrain.tasks.task import module_of

    text = json.dumps({**size, "frozen": frozen, "weights": "tower.pt" if frozen else None})
    path = str(tiny_run())
    config = load_config(path, [f"task.text={text}", "data.context_length=20"])
    with torch.device("meta"):
        tower = module_of(config, classes=0).get_submodule("text")
        with FlopCounterMode(display=False) as counter:
            tower(torch.zeros(4, 20, dtype=torch.long))
    without = count(load_config(path, ["task.weights.text=0", "data.context_length=20"]), classes=0)
    more = count(config, classes=0).flops_per_sample - without.flops_per_sample
    assert more == pytest.approx((1 if frozen else 3) * counter.get_total_flops() / 4)


def test_checkpointing_keeps_less_and_recomputes_one_block() -> None:
    arguments = {"channels": 64, "depths": (4, 4, 18, 4), "groups": (4, 8, 16, 32)}
    whole = image_activations(arguments, 224, checkpointing=False)
    cut = image_activations(arguments, 224, checkpointing=True)
    assert cut.peak < whole.peak / 3
    assert whole.largest_block == 0 < cut.largest_block


def test_the_shipped_h_configuration_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        run(["plan", "internimage_h_m3i_427m", "--gpus", "128", "--gpu", "h100", "--samples", "427000000", "--json"])
        == 0
    )
    result = json.loads(capsys.readouterr().out)
    assert result["parameters"]["image"] == pytest.approx(1.0896e9, rel=0.002)
    assert result["samples"] == 30 * 427_000_000
    assert [stage["total"] for stage in result["stages"]] == sorted(
        (s["total"] for s in result["stages"]), reverse=True
    )
    assert 0 < result["days"][0] < result["days"][1]
    assert run(["plan", "internimage_h_m3i_427m", "--gpus", "128", "--gpu", "a100"]) == 0
    assert "give --samples" in capsys.readouterr().out


def test_counts_of_a_tiny_run_equal_the_task_that_training_builds(tiny_run: Callable[..., Path]) -> None:
    from pretrain.tasks.task import module_of

    config = load_config(str(tiny_run()))
    counts = count(config, classes=0)
    task = module_of(config, classes=0)
    assert counts.sizes.trainable + counts.sizes.frozen == sum(p.numel() for p in task.parameters())
    teacher = task.teacher()
    assert teacher is not None
    assert counts.sizes.teacher == sum(p.numel() for p in teacher.parameters())


def test_the_epoch_is_read_from_the_manifest_and_a_batch_that_does_not_divide_is_refused(
    tiny_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny_run("schedule.steps=null", "schedule.epochs=10")
    machine = Machine.of(load_config(str(path)), memory=80, mfu=0.3, peak=100)
    result = plan_run(load_config(str(path)), gpus=2, machine=machine)
    assert result["samples"] == 240
    assert run(["plan", str(path), "--gpus", "3", "--gpu", "h100"]) == 2
    assert "not divisible by 3 processes" in capsys.readouterr().err

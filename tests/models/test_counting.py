"""Counts in closed form equal those of models that are built (on the meta device), and the published figures."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pretrain.analysis.variants import ablation_table, search_space_table, variants_table
from pretrain.models import VARIANTS, InternImage, create_model
from pretrain.models.ablation import sharing_saves
from pretrain.models.activations import image_activations
from pretrain.models.counting import SAMPLING_COST, multiply_adds, parameters
from pretrain.models.scaling import ORIGIN, Stack, candidates, scale

PUBLISHED = {  # facts of the released classifiers: parameters to the digit that is stated, multiply-adds likewise
    "internimage_t": ("29.92", 5),
    "internimage_s": ("50.08", 8),
    "internimage_b": ("97.46", 16),
    "internimage_l": ("223.3", 108),
    "internimage_xl": ("334.8", 163),
    "internimage_h": ("1089.6", 1478),
    "internimage_g": ("3076", 2700),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_ones_to_the_digit_and_those_of_the_built_model(name):
    stated, _ = PUBLISHED[name]
    digits = len(stated.partition(".")[2])
    with torch.device("meta"):
        built = sum(parameter.numel() for parameter in create_model(name).parameters())
    assert f"{built / 1e6:.{digits}f}" == stated
    assert parameters(VARIANTS[name].arguments).total == built


ROUNDED_TO = {"internimage_g": 100e9}  # published as 2700 G; the others to the G


@pytest.mark.parametrize("name", PUBLISHED)
def test_multiply_adds_round_to_the_published_ones_without_the_centre_scale_and_head_of_h_and_g(name):
    """The one convention found for all seven; the authors do not state theirs."""
    variant, unit = VARIANTS[name], ROUNDED_TO.get(name, 1e9)
    counted = multiply_adds(variant.arguments, variant.image_size, as_published=True)
    assert round(counted.total / unit) * unit == PUBLISHED[name][1] * 1e9
    everything = multiply_adds(variant.arguments, variant.image_size)
    if name in ("internimage_h", "internimage_g"):
        assert counted.head == 0 < everything.head and counted.stem == everything.stem
        assert 1.003 < everything.total / (variant.flops * 1e9) < 1.01
    else:
        assert counted == everything


def test_multiply_adds_agree_with_torchs_counter():
    arguments = {"channels": 32, "depths": (1, 1, 2, 1), "groups": (2, 4, 8, 16), "num_classes": 10}
    model = InternImage(**arguments, backend="reference").double().eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 64, 96, dtype=torch.float64))
    pixels = [16 * 24, 8 * 12, 4 * 6, 2 * 3]
    sampling = sum(
        depth * n * 32 * 2**stage * 9 * SAMPLING_COST
        for stage, (n, depth) in enumerate(zip(pixels, (1, 1, 2, 1), strict=True))
    )
    # the product that the points come from has 27 columns a group, and some more to a multiple of 8
    padding = sum(
        depth * n * 32 * 2**stage * (-27 * groups % 8)
        for stage, (n, depth, groups) in enumerate(zip(pixels, (1, 1, 2, 1), (2, 4, 8, 16), strict=True))
    )
    assert counter.get_total_flops() // 2 == multiply_adds(arguments, (64, 96)).total - sampling + padding


@pytest.mark.parametrize(
    "change",
    [
        {"share_weights": False},
        {"remove_center": True},
        {"kernel_size": 5, "dw_kernel_size": 3},
        {"use_clip_projector": True, "clip_embed_dim": 48, "head_hidden_size": 24, "clip_heads": 4, "num_classes": 0},
        {"center_feature_scale": True, "post_norm": True, "layer_scale": 1e-5},
        {"res_post_norm": True, "level2_post_norm": True, "level2_post_norm_block_ids": (0, 1)},
        {"groups": (1, 1, 1, 1), "mask_activation": "sigmoid", "mlp_ratio": 2.5, "in_chans": 4},
    ],
    ids=lambda change: next(iter(change)),
)
def test_parameters_in_closed_form_are_those_of_the_built_model(change):
    arguments = {"channels": 16, "depths": (1, 1, 2, 1), "groups": (1, 2, 4, 8), "num_classes": 7, **change}
    with torch.device("meta"):
        built = sum(parameter.numel() for parameter in InternImage(**arguments).parameters())
    assert parameters(arguments).total == built


def test_the_largest_is_made_on_the_meta_device_in_two_seconds_and_a_hundred_megabytes():
    """In a process of its own, by its peak of resident memory: what torch allocates counts too."""
    script = """
import json, time
import torch
from pretrain.models import create_model

def peak():
    # of this process alone: ru_maxrss keeps that of the process which started it
    (line,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024

with torch.device("meta"):
    create_model("custom", channels=16, depths=(1, 1, 1, 1), groups=(1, 2, 4, 8))   # what torch loads at first use
    before, started = peak(), time.process_time()
    model = create_model("internimage_g")
    seconds, grown = time.process_time() - started, peak() - before
parameters = list(model.parameters())
print(json.dumps([seconds, grown, sum(p.numel() for p in parameters), all(p.is_meta for p in parameters)]))
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, check=True, capture_output=True, text=True)
    seconds, grown, count, meta = json.loads(done.stdout)
    assert meta and count == parameters(VARIANTS["internimage_g"].arguments).total
    assert seconds < 2 and grown < 100e6, (seconds, grown)


def test_the_search_has_thirty_candidates_and_says_why_eleven_cannot_be_built():
    found = list(candidates())
    assert len(found) == 30
    refused = [c for c in found if c.reason]
    assert sum(c.parameters is None for c in refused) == 10
    assert [c.stack for c in refused if c.parameters is not None] == [Stack(80, 16, 5, 5)]
    for candidate in found:
        if candidate.reason is None:
            assert abs(candidate.parameters - 30e6) < 1e6
            assert candidate.stack.l1 <= candidate.stack.l3
    assert ORIGIN in [c.stack for c in found if c.reason is None]


def test_the_origin_of_the_search_is_the_tiny_variant():
    assert ORIGIN.arguments() == {k: VARIANTS["internimage_t"].arguments[k] for k in ("channels", "depths", "groups")}


def test_scaling_multiplies_depth_by_1_09_and_width_by_1_36():
    assert scale(0) == ORIGIN
    for phi in (1, 2, 3):
        stack = scale(phi)
        assert stack.depth == round(30 * 1.09**phi)
        assert abs(stack.channels - 64 * 1.36**phi) <= 8
        assert stack.problem() is None
    # one step of phi doubles the multiply-adds, about
    cost = [multiply_adds(scale(phi).arguments(), 224).total for phi in (0, 1, 2, 3)]
    assert 7 < cost[3] / cost[0] < 9


def test_tables_have_a_row_for_each_and_render():
    from rich.console import Console

    for (rows, table), count in ((variants_table(), 7), (search_space_table(), 30), (ablation_table(), 4)):
        assert len(rows) == count == table.row_count
        console = Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: SIM115
        console.print(table)
        text = console.export_text()
        assert "pre, res-post" in text or "cannot be built" in text or "one group" in text


def test_the_command_line_prints_the_tables_and_their_rows(capsys):
    from launch.cli import run

    for command, heading, rows in (
        ("variants", "G mult-adds", 7),
        ("search-space", "19 of which", 30),
        ("ablations", "84.2%", 4),
    ):
        assert run(["inspect", command]) == 0
        assert heading in " ".join(capsys.readouterr().out.split())
        assert run(["inspect", command, "--json"]) == 0
        assert len(json.loads(capsys.readouterr().out)) == rows


def test_a_meta_device_runs_the_forward_pass_too():
    with torch.device("meta"):
        for name in ("internimage_t", "internimage_h"):
            assert create_model(name).train()(torch.empty(2, 3, 64, 64)).shape == (2, 1000)


def test_sharing_saves_h_the_published_share_of_parameters_within_a_point_and_a_half():
    saving = sharing_saves()
    h = VARIANTS["internimage_h"].arguments
    with torch.device("meta"):
        shared, unshared = (
            sum(p.numel() for p in InternImage(**h, share_weights=share).parameters()) for share in (True, False)
        )
    assert saving.parameters == pytest.approx(1 - shared / unshared, abs=1e-12)
    assert abs(saving.parameters - 0.420) < 0.015 and abs(saving.backbone - 0.420) < 0.015
    # by hand: input projected, gradient in: 2; offsets and masks 27/32; features and their gradient 2 or 18
    assert saving.operator == pytest.approx(1 - (4 + 27 / 32) / (20 + 27 / 32))


def test_the_memory_that_sharing_saves_h_in_training_is_that_of_its_activations_and_states():
    rows, _ = ablation_table()
    (saves,) = [row["sharing_saves"] for row in rows if "sharing_saves" in row]
    h = VARIANTS["internimage_h"].arguments
    count = {share: parameters({**h, "share_weights": share}).total for share in (True, False)}
    kept = image_activations(h, 224, checkpointing=False).kept
    # by hand: a block keeps 8 more sampled maps before the centre is mixed in, 8 after, the centre once, and the masks
    pixels, widths = [56**2, 28**2, 14**2, 7**2], [320, 640, 1280, 2560]
    more = sum(d * n * (17 * c + 9 * c // 32) for d, n, c in zip(h["depths"], pixels, widths, strict=True))
    shared, unshared = (4 * k + 16 * count[share] / 32 for k, share in ((kept, True), (kept + more, False)))
    assert saves["training_memory"] == pytest.approx(1 - shared / unshared, rel=1e-9)
    assert saves["parameters"] == sharing_saves().parameters


def test_the_ablations_are_models_that_run():
    from pretrain.models.ablation import ABLATIONS

    for change in ABLATIONS.values():
        model = InternImage(
            **{"channels": 16, "depths": (1, 1, 1, 1), "groups": (1, 2, 4, 8), "num_classes": 3, **change}
        )
        assert model(torch.rand(1, 3, 32, 32)).isfinite().all()

"""Counts in closed form equal those of models that are built (on the meta device), and the published figures."""

import time
import tracemalloc

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pretrain.analysis.variants import ablation_table, search_space_table, variants_table
from pretrain.models import VARIANTS, InternImage, create_model
from pretrain.models.ablation import sharing_saves
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


@pytest.mark.parametrize("name", list(PUBLISHED)[:5])
def test_multiply_adds_of_t_to_xl_round_to_the_published_ones(name):
    variant = VARIANTS[name]
    assert round(multiply_adds(variant.arguments, variant.image_size).total / 1e9) == PUBLISHED[name][1]


def test_multiply_adds_of_h_and_g_are_the_published_ones_when_only_layers_count():
    h, g = VARIANTS["internimage_h"], VARIANTS["internimage_g"]
    assert int(multiply_adds(h.arguments, h.image_size, layers_only=True).total / 1e9) == 1478
    assert round(multiply_adds(g.arguments, g.image_size, layers_only=True).total / 1e9, -2) == 2700
    for variant in (h, g):
        everything = multiply_adds(variant.arguments, variant.image_size).total / 1e9
        assert variant.flops < everything < 1.011 * variant.flops


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
    assert counter.get_total_flops() // 2 == multiply_adds(arguments, (64, 96)).total - sampling
    assert (
        multiply_adds(arguments, (64, 96), layers_only=True).total
        == multiply_adds(arguments, (64, 96)).total - sampling
    )


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
    tracemalloc.start()
    started = time.perf_counter()
    with torch.device("meta"):
        model = create_model("internimage_g")
    elapsed = time.perf_counter() - started
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert all(parameter.is_meta for parameter in model.parameters())
    assert elapsed < 2 and peak < 100e6


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
        assert "internimage_h" in text or "cannot be built" in text or "one group" in text


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


def test_the_ablations_are_models_that_run():
    from pretrain.models.ablation import ABLATIONS

    for change in ABLATIONS.values():
        model = InternImage(
            **{"channels": 16, "depths": (1, 1, 1, 1), "groups": (1, 2, 4, 8), "num_classes": 3, **change}
        )
        assert model(torch.rand(1, 3, 32, 32)).isfinite().all()

"""Merged groups give every parameter what the plain definition gives it."""

import pytest
from training_fakes import configuration

from pretrain.models import InternImage, official
from pretrain.tasks.module import layout_of
from pretrain.training.parameter_groups import layer_of, parameter_groups


@pytest.fixture(scope="module")
def task():
    from torch import nn

    holder = nn.Module()
    holder.image = InternImage(
        channels=32, depths=(2, 2, 4, 2), groups=(2, 4, 8, 16), num_classes=7, use_clip_projector=True,
        clip_embed_dim=32, head_hidden_size=32, clip_heads=4, level2_post_norm=True,
        level2_post_norm_block_ids=(1, 3), res_post_norm=True,
        center_feature_scale=True, dw_kernel_size=5,
    )  # fmt: skip
    holder.text = nn.Linear(4, 4)
    return holder


def plain_depth(key: str) -> int:
    """By the official keys, spelled out: the rule of BEiT on blocks (2, 2, 4, 2); 11 is above all of them."""
    before = {0: 0, 1: 2, 2: 4, 3: 8}
    if key.startswith("patch_embed."):
        return 0
    if not key.startswith("levels."):
        return 11
    _, level, what, *rest = key.split(".")
    if what == "blocks":
        return before[int(level)] + int(rest[0]) + 1
    if what == "post_norms":
        return 4 + {"0": 1, "1": 3}[rest[0]] + 1
    return {0: 2, 1: 4, 2: 8, 3: 10}[int(level)]


def test_every_parameter_has_the_depth_of_the_plain_definition(task) -> None:
    backbone = layout_of(task.image, "image.")
    assert backbone.depths == (2, 2, 4, 2) and backbone.post_norm_blocks == (1, 3)
    for key in official.state_dict(task.image):
        name = official.own_names(task.image)[key]
        assert layer_of(f"image.{name}", backbone) == plain_depth(key), key
    assert layer_of("text.weight", backbone) == 11


def test_groups_are_merged_and_say_what_the_plain_definition_says(task) -> None:
    optimizer = configuration(optimizer__layer_decay=0.9, optimizer__offset_lr_scale=0.1).optimizer
    shapes = {name: tuple(p.shape) for name, p in task.named_parameters()}
    groups = parameter_groups(shapes, optimizer, layout_of(task.image, "image."))
    assert len({(g.lr_scale, g.weight_decay) for g in groups}) == len(groups) < 50 < len(shapes)
    found = {name: group for group in groups for name in group.names}
    assert set(found) == set(shapes) and sum(len(g.names) for g in groups) == len(shapes)

    expected = {}
    for key, value in official.state_dict(task.image).items():
        scale = 0.9 ** (11 - plain_depth(key)) * (0.1 if ".dcn.offset." in key else 1.0)
        decay = 0.0 if value.ndim <= 1 or key.endswith("bias") else optimizer.weight_decay
        expected[f"image.{official.own_names(task.image)[key]}"] = scale, decay
    for name, (scale, decay) in expected.items():
        assert (found[name].lr_scale, found[name].weight_decay) == (pytest.approx(scale), decay), name


def test_without_layer_decay_there_are_two_groups(task) -> None:
    shapes = {name: tuple(p.shape) for name, p in task.named_parameters()}
    groups = parameter_groups(shapes, configuration().optimizer, layout_of(task.image, "image."))
    assert sorted((g.lr_scale, g.weight_decay) for g in groups) == [(1.0, 0.0), (1.0, 0.05)]

"""timm takes the registered models as its own: what its model tests ask of every model, asked of ours."""

import re

import pytest
import timm
import torch
import yaml
from timm.optim import param_groups_layer_decay

from data_pipeline.errors import UserError
from pretrain.configuration import load_config
from pretrain.models import VARIANTS, create_model, official
from pretrain.models.timm_features import parameters_by_depth

SMALL = {"channels": 16, "depths": (1, 1, 2, 1), "groups": (1, 2, 4, 8), "drop_path_rate": 0.0}
SMALL_H = {
    **SMALL,
    "level2_post_norm_block_ids": (1,),
    "clip_embed_dim": 32,
    "head_hidden_size": 24,
    "clip_heads": 4,
}
CASES = [("internimage_t", SMALL), ("internimage_b", SMALL), ("internimage_h", SMALL_H), ("internimage_g", SMALL_H)]


@pytest.fixture(params=CASES, ids=lambda case: case[0])
def case(request):
    return request.param


def test_all_seven_are_listed_with_their_tags():
    assert set(timm.list_models("internimage_*")) == set(VARIANTS)
    tags = timm.list_models("internimage_*", pretrained=True)
    assert "internimage_l.in22k" in tags and len(tags) == 11
    for name in tags:
        cfg = timm.get_pretrained_cfg(name)
        assert cfg.num_classes == (21841 if name.endswith("in22k") else 1000)
        assert cfg.input_size[1] == VARIANTS[name.split(".")[0]].image_size or name.endswith("in22k")


@pytest.mark.parametrize("name", VARIANTS)
def test_the_description_of_each_is_true_of_the_model(name):
    """What timm's test_model_default_cfgs asks, of a narrowed copy at a quarter of the size, in eval mode."""
    cfg = timm.get_pretrained_cfg(name)
    clip_head = VARIANTS[name].arguments.get("use_clip_projector", False)
    model = timm.create_model(name, **(SMALL_H if clip_head else SMALL)).eval()
    size = cfg.input_size[1] // 4
    x = torch.rand(1, 3, size, size)
    state = model.state_dict()
    with torch.no_grad():
        features, logits = model.forward_features(x), model(x)
        assert logits.shape == (1, cfg.num_classes) and cfg.num_classes == model.num_classes
        stride = cfg.input_size[1] // cfg.pool_size[0]
        assert cfg.pool_size == (cfg.input_size[1] // stride, cfg.input_size[2] // stride)
        assert features.shape == (1, model.num_features, -(-size // stride), -(-size // stride))
        if not clip_head:  # its map is fused and pooled by attention, so that it takes no classifier
            model.reset_classifier(cfg.num_classes, "")
            assert model(x).shape == (1, cfg.num_classes, *features.shape[2:])
            model.reset_classifier(0, "")
        else:
            model.reset_classifier(0, "")
            assert model(x).shape == features.shape
        model.reset_classifier(0, "avg")
        assert model(x).shape == (1, model.head_hidden_size)
    for key in (cfg.classifier, cfg.first_conv):
        assert f"{key}.weight" in state, key
    assert not any(key.startswith("head.") for key in model.state_dict())
    assert state[f"{cfg.first_conv}.weight"].shape[1] == cfg.input_size[0]
    assert state[f"{cfg.classifier}.weight"].shape[0] == cfg.num_classes
    assert len(cfg.mean) == len(cfg.std) == 3 and cfg.crop_pct == 1.0 and cfg.interpolation == "bicubic"


def test_the_same_model_through_create_model_timm_and_the_configuration_file(golden, tmp_path):
    arguments = {k: v for k, v in golden.arguments.items() if k != "num_classes"}
    file = tmp_path / "run.yaml"
    model = {"name": "custom", "num_classes": 10, "overrides": arguments}
    run = {"model": model, "data": {"sources": [{"path": "x"}]}, "schedule": {"steps": 1}}
    file.write_text(yaml.safe_dump(run), encoding="utf-8")
    config = load_config(str(file))
    built = [
        create_model("custom", num_classes=10, **arguments),
        timm.create_model("internimage_t", num_classes=10, **{"drop_path_rate": 0.0, **arguments}),
        create_model(config.model.name, config.model.num_classes, **config.model.overrides),
    ]
    for model in built:
        official.load_state_dict(model, golden.state)
        with torch.no_grad():
            logits = model.eval()(golden.image)
        worst = (logits - golden.expected["logits"]).abs().max()
        assert worst <= 1e-5 * golden.expected["logits"].abs().max()


def test_forward_features_feeds_forward_head(case):
    name, arguments = case
    model = timm.create_model(name, num_classes=7, **arguments).eval()
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        features = model.forward_features(x)
        stride = 16 if model.use_clip_projector else 32
        assert features.shape == (2, model.num_features, 64 // stride, 96 // stride)
        assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
        torch.testing.assert_close(model.forward_head(features), model(x), rtol=0, atol=0)


def test_reset_classifier(case):
    name, arguments = case
    model = timm.create_model(name, num_classes=7, **arguments).eval()
    assert model.get_classifier() is model.head and model.head.out_features == 7
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        model.reset_classifier(3)
        assert model(x).shape == (1, 3) and model.num_classes == 3
        model.reset_classifier(0)
        assert model(x).shape == (1, model.head_hidden_size)
        pooled = model(x)
        model.reset_classifier(0, "")
        maps = model(x)
        assert maps.ndim == 4
        if not model.use_clip_projector:
            torch.testing.assert_close(maps.mean((2, 3)), pooled)
    with pytest.raises(ValueError, match="'max'"):
        model.reset_classifier(3, "max")


def test_features_only_gives_four_nchw_maps_at_strides_4_8_16_32(case):
    name, arguments = case
    model = timm.create_model(name, features_only=True, **arguments).eval()
    assert model.feature_info.channels() == [16, 32, 64, 128]
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    x = torch.randn(1, 3, 64, 96)
    whole = timm.create_model(name, **arguments).eval()
    whole.load_state_dict(model.model.state_dict(), strict=False)
    with torch.no_grad():
        features = model(x)
        expected = whole.forward_stages(x)
    assert [f.shape for f in features] == [(1, 16, 16, 24), (1, 32, 8, 12), (1, 64, 4, 6), (1, 128, 2, 3)]
    for feature, stage in zip(features, expected, strict=True):
        torch.testing.assert_close(feature, stage.permute(0, 3, 1, 2), rtol=0, atol=0)
        assert feature.is_contiguous(memory_format=torch.channels_last)
    chosen = timm.create_model(name, features_only=True, out_indices=(1, -2), **arguments).eval()
    assert [tuple(f.shape) for f in chosen(x)] == [(1, 32, 8, 12), (1, 64, 4, 6)]
    assert len(chosen.model.stages) == 3


def test_fewer_features_leave_no_parameter_without_a_gradient(case):
    name, arguments = case
    for indices in ((0, 1), (2,)):
        model = timm.create_model(name, features_only=True, out_indices=indices, **arguments).train()
        sum(feature.square().mean() for feature in model(torch.randn(2, 3, 64, 64))).backward()
        assert [key for key, parameter in model.named_parameters() if parameter.grad is None] == []


def test_a_classifier_on_the_unpooled_map_is_refused_where_it_could_not_read_it():
    with pytest.raises(ValueError, match=r"num_classes=3.*the 24 values .* not the map of 32; give num_classes=0"):
        timm.create_model("internimage_h", num_classes=3, global_pool="", **SMALL_H)
    model = timm.create_model("internimage_h", num_classes=3, **SMALL_H)
    with pytest.raises(ValueError, match="num_classes=5"):
        model.reset_classifier(5, "")
    assert model.global_pool == "avg" and model.head.out_features == 3
    maps = timm.create_model("internimage_t", num_classes=3, global_pool="", **SMALL)(torch.randn(1, 3, 64, 64))
    assert maps.shape == (1, 3, 2, 2)


def test_forward_intermediates(case):
    name, arguments = case
    model = timm.create_model(name, **arguments).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        final, maps = model.forward_intermediates(x, indices=2)
        torch.testing.assert_close(final, model.forward_features(x), rtol=0, atol=0)
        assert [m.shape[1] for m in maps] == [64, 128]
        only = model.forward_intermediates(x, [0], intermediates_only=True, output_fmt="NHWC", stop_early=True)
        assert [tuple(m.shape) for m in only] == [(1, 16, 16, 16)]
    with pytest.raises(ValueError, match="4 stages"):
        model.forward_intermediates(x, [4])


def test_every_parameter_gets_a_finite_gradient(case):
    name, arguments = case
    model = timm.create_model(name, num_classes=7, **arguments).train()
    model.set_grad_checkpointing()
    model(torch.randn(2, 3, 64, 64)).square().mean().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


def test_other_image_channels_and_odd_sizes(case):
    name, arguments = case
    model = timm.create_model(name, in_chans=1, num_classes=3, **arguments).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 1, 70, 90)).shape == (1, 3)


def test_the_models_layers_take_no_unknown_argument_silently():
    with pytest.raises(TypeError):
        timm.create_model("internimage_t", widht=3)
    with pytest.raises(UserError, match=r"'internimage_x'.*Did you mean 'internimage_xl'"):
        create_model("internimage_x")
    with pytest.raises(UserError, match="stage 1 has 16 channels, not divisible by 3 groups"):
        create_model("custom", channels=16, depths=(1, 1, 1, 1), groups=(3, 2, 4, 8))


def test_pretrained_weights_go_through_the_filter_as_for_timms_own_models(golden_t, tmp_path):
    torch.save({"model": golden_t.state}, tmp_path / "internimage.pth")
    arguments = {**{k: v for k, v in golden_t.arguments.items() if k != "num_classes"}, "drop_path_rate": 0.0}
    overlay = {"file": str(tmp_path / "internimage.pth"), "num_classes": 10}
    model = timm.create_model("internimage_t", pretrained=True, pretrained_cfg_overlay=overlay, **arguments).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(golden_t.image), golden_t.build()(golden_t.image), rtol=0, atol=0)
    other = timm.create_model(
        "internimage_t", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3, **arguments
    )
    assert torch.equal(other.stem.conv1.weight, model.stem.conv1.weight) and other.head.out_features == 3
    gray = timm.create_model("internimage_t", pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1, **arguments)
    torch.testing.assert_close(gray.stem.conv1.weight, model.stem.conv1.weight.sum(1, keepdim=True))
    del golden_t.state["levels.0.blocks.0.norm1.0.weight"]
    torch.save({"model": golden_t.state}, tmp_path / "internimage.pth")
    with pytest.raises(UserError, match=r"missing: stages\.0\.blocks\.0\.norm1\.weight"):
        timm.create_model("internimage_t", pretrained=True, pretrained_cfg_overlay=overlay, **arguments)


@pytest.mark.parametrize("way", [{}, {"features_only": True}, {"num_classes": 3}], ids=str)
@pytest.mark.parametrize("layout", ["renamed", "own", "halved"])
def test_pretrained_weights_that_would_leave_a_part_at_random_are_refused_in_every_way_of_loading(
    layout, way, golden_t, tmp_path
):
    arguments = {**{k: v for k, v in golden_t.arguments.items() if k != "num_classes"}, "drop_path_rate": 0.0}
    if layout == "renamed":
        state, named = {f"x{key}": value for key, value in golden_t.state.items()}, "missing: stem.conv1.weight"
    elif layout == "own":
        state, named = golden_t.build().state_dict(), "unexpected: stages.4.norm.weight"
        state["stages.4.norm.weight"] = state.pop("stages.3.norm.weight")
    else:
        state, named = dict(golden_t.state), "missing: stages.1.blocks.0.dcn.mask.bias"
        del state["levels.1.blocks.0.dcn.mask.bias"]
    torch.save(state, tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth"), "num_classes": 10}
    with pytest.raises(UserError, match=re.escape(named)) as error:
        timm.create_model("internimage_t", pretrained=True, pretrained_cfg_overlay=overlay, **{**arguments, **way})
    assert len(str(error.value).splitlines()) < 30


@pytest.mark.parametrize("own", [False, True], ids=["official", "own"])
def test_the_prefix_of_a_wrapper_is_no_hindrance(own, golden_t, tmp_path):
    state = golden_t.build().state_dict() if own else golden_t.state
    torch.save({"state_dict": {f"module.backbone.{key}": v for key, v in state.items()}}, tmp_path / "weights.pth")
    arguments = {**{k: v for k, v in golden_t.arguments.items() if k != "num_classes"}, "drop_path_rate": 0.0}
    overlay = {"file": str(tmp_path / "weights.pth"), "num_classes": 10}
    model = timm.create_model("internimage_t", pretrained=True, pretrained_cfg_overlay=overlay, **arguments)
    assert all(torch.equal(value, golden_t.build().state_dict()[key]) for key, value in model.state_dict().items())


def test_layer_decay_counts_each_norm_with_the_block_that_it_follows():
    model = timm.create_model("internimage_h", **SMALL_H)
    depth = {name: number for number, name in parameters_by_depth(model)}
    assert depth["stem.conv1.weight"] == 0
    assert depth["stages.0.blocks.0.dcn.input_proj.weight"] == depth["stages.0.downsample.conv.weight"] == 1
    assert (
        depth["stages.2.post_norms.0.weight"]
        == depth["stages.2.blocks.1.norm1.weight"]
        == depth["stages.2.norm.bias"]
        == 4
    )
    assert depth["stages.3.norm.weight"] == depth["stages.3.blocks.0.mlp.fc1.weight"] == 5
    assert depth["head.weight"] == depth["clip_projector.q_weight"] == depth["fuse.proj4.weight"] == 6
    assert set(depth) == {name for name, _ in model.named_parameters()}
    scales = {}
    for group in param_groups_layer_decay(model, layer_decay=0.5):
        for parameter in group["params"]:
            scales[id(parameter)] = group["lr_scale"]
    for name, parameter in model.named_parameters():
        assert scales[id(parameter)] == 0.5 ** (6 - depth[name]), name

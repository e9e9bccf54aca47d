"""The image model of dense tasks: into transformers, out of mmdetection's and mmsegmentation's files, and back."""

from pathlib import Path

import pytest
import torch
from dense_runs import tiny

from pretrain.finetuning.weights import load_into
from pretrain.handoff import export, read_backbone
from pretrain.models import InternImage, official
from pretrain.tasks.module import image_of
from pretrain.tasks.task import task_of

transformers = pytest.importorskip("transformers")

ARGUMENTS = {"channels": 16, "depths": [1, 1, 2, 1], "groups": [1, 2, 4, 8], "layer_scale": 0.1}


def test_auto_backbone_gives_the_stages_it_is_asked_for() -> None:
    from pretrain.models.auto_backbone import InternImageBackboneConfig

    config = InternImageBackboneConfig(
        arguments={**ARGUMENTS, "drop_path_rate": 0.3}, out_features=["stage2", "stage4"]
    )
    assert config.depths == [1, 1, 2, 1] and config.out_indices == [1, 3]
    torch.manual_seed(0)
    model = transformers.AutoBackbone.from_config(config)
    assert model.channels == [32, 128] and model.image.stages[3].blocks[0].drop_path1.rate == pytest.approx(0.3)
    x = torch.randn(2, 3, 64, 96)
    out = model.eval()(x, output_hidden_states=True)
    expected = [stage.permute(0, 3, 1, 2) for stage in model.image.forward_stages(x)]
    for found, wanted in zip(
        (*out.feature_maps, *out.hidden_states), (expected[1], expected[3], *expected), strict=True
    ):
        assert torch.equal(found, wanted)
    model.gradient_checkpointing_enable()
    assert all(block.kept == () for stage in model.image.stages for block in stage.blocks)


def test_the_backbone_is_saved_and_read_back(tmp_path: Path) -> None:
    from pretrain.models.auto_backbone import InternImageBackbone, InternImageBackboneConfig

    config = InternImageBackboneConfig(arguments=ARGUMENTS, out_indices=[0, 1, 2, 3])
    model = transformers.AutoBackbone.from_config(config).eval()
    model.save_pretrained(tmp_path)
    again = InternImageBackbone.from_pretrained(tmp_path).eval()
    x = torch.randn(1, 3, 64, 64)
    assert all(torch.equal(a, b) for a, b in zip(model(x).feature_maps, again(x).feature_maps, strict=True))


def public_file(path: Path, image: InternImage) -> Path:
    """As mmdetection and mmsegmentation save InternImage: no pooling or classifier, beside the heads."""
    state = {
        f"backbone.{key}": value
        for key, value in official.state_dict(image).items()
        if not key.startswith(("conv_head.", "head."))
    }
    heads = {"neck.lateral_convs.0.conv.weight": torch.ones(4, 16, 1, 1), "rpn_head.rpn_conv.bias": torch.ones(4)}
    heads |= {"roi_head.bbox_head.fc_cls.weight": torch.ones(4, 8), "decode_head.conv_seg.bias": torch.ones(4)}
    torch.save({"meta": {"epoch": 12, "CLASSES": ("a", "b")}, "state_dict": state | heads, "optimizer": {}}, path)
    return path


@pytest.mark.parametrize("task", ["instance", "semantic"])
def test_weights_of_the_public_repository_start_a_fine_tuning(tmp_path: Path, task: str) -> None:
    torch.manual_seed(1)
    theirs = InternImage(**ARGUMENTS, num_classes=0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_()
    config = tiny(task, tmp_path)
    module = task_of(config).build(config.model, config.data, classes=3)
    load_into(image_of(module), public_file(tmp_path / "mask_rcnn_internimage_t_fpn_1x_coco.pth", theirs))
    own = dict(image_of(module).named_parameters())
    for name, value in theirs.named_parameters():
        if not name.startswith(("conv_head.", "head.")):
            assert torch.equal(own[name], value), name


def test_a_backbone_is_exported_as_the_public_repository_names_it(tmp_path: Path) -> None:
    torch.manual_seed(2)
    theirs = InternImage(**ARGUMENTS, num_classes=0)
    source = public_file(tmp_path / "theirs.pth", theirs)
    torch.save({"model": official.state_dict(theirs)}, tmp_path / "whole.pth")
    out = export(tmp_path / "whole.pth", "mmdet", tmp_path / "out.pth")
    made = torch.load(out, weights_only=True)["state_dict"]
    expected = torch.load(source, weights_only=True)["state_dict"]
    expected = {key: value for key, value in expected.items() if key.startswith("backbone.")}
    assert made.keys() == expected.keys() and all(torch.equal(made[key], expected[key]) for key in made)
    assert read_backbone(out).state.keys() >= {key.removeprefix("backbone.") for key in made}


def test_parts_that_no_stage_depends_on_are_frozen_and_stay(tmp_path: Path) -> None:
    config = tiny("detection", tmp_path)
    config.task.frozen_stages = 2  # type: ignore[attr-defined]
    module = task_of(config).build(config.model, config.data, classes=3)
    trained = {name for name, p in image_of(module).named_parameters() if p.requires_grad}
    assert trained and all(name.startswith(("stages.2.", "stages.3.")) for name in trained)
    assert any(name.startswith("conv_head.") for name, _ in image_of(module).named_parameters())

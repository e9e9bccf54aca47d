"""Which weights arrive, which are new, and what is refused."""

import pytest
import torch

from data_pipeline.errors import UserError
from pretrain.finetuning.weights import load_into, read_rows
from pretrain.handoff import export
from pretrain.models import create_model, official
from pretrain.training.checkpoint.disk import load_weights

TINY = {
    "channels": 16,
    "depths": [1, 1, 1, 1],
    "groups": [1, 2, 4, 8],
    "clip_embed_dim": 32,
    "clip_heads": 2,
    "head_hidden_size": 32,
}


def model(classes=3, **changes):
    return create_model("custom", classes, **{**TINY, "use_clip_projector": True, **changes})


@pytest.mark.parametrize("form", ["run", "checkpoint", "safetensors", "official"])
def test_the_backbone_arrives_from_every_form_and_the_classifier_stays_new(pretrained, tmp_path, form):
    source = {
        "run": lambda: pretrained,
        "checkpoint": lambda: pretrained / "checkpoints/step-00000002",
        "safetensors": lambda: export(pretrained, "safetensors", tmp_path / "backbone.safetensors"),
        "official": lambda: export(pretrained, "official", tmp_path / "backbone.pth"),
    }[form]()
    trained, _ = load_weights(pretrained, "ema")
    fresh = model()
    before = fresh.head.weight.clone()
    assert load_into(fresh, source) == ["head.bias", "head.weight"]
    for name, value in fresh.state_dict().items():
        if not name.startswith("head."):
            assert torch.equal(value, trained[f"image.{name}"]), name
    assert torch.equal(fresh.head.weight, before)


def test_rows_of_an_old_classifier_become_the_new_one(tmp_path):
    wide = model(classes=21)
    torch.save({"model": official.state_dict(wide)}, tmp_path / "wide.pth")
    narrow = model(classes=3)
    assert load_into(narrow, tmp_path / "wide.pth", head_rows=torch.tensor([20, 0, 7])) == []
    assert torch.equal(narrow.head.weight, wide.head.weight[[20, 0, 7]])
    assert torch.equal(narrow.head.bias, wide.head.bias[[20, 0, 7]])
    with pytest.raises(UserError, match="2 rows were given for 3 classes"):
        load_into(narrow, tmp_path / "wide.pth", head_rows=torch.tensor([0, 1]))
    with pytest.raises(UserError, match="21 rows"):
        load_into(narrow, tmp_path / "wide.pth", head_rows=torch.tensor([0, 1, 21]))


def test_a_model_that_pools_otherwise_keeps_its_own_new_pooling(pretrained):
    pooling = model(use_clip_projector=False)
    new = load_into(pooling, pretrained)
    assert {key.partition(".")[0] for key in new} == {"conv_head", "head"}
    trained, _ = load_weights(pretrained, "ema")
    assert torch.equal(pooling.stages[3].blocks[0].mlp.fc1.weight, trained["image.stages.3.blocks.0.mlp.fc1.weight"])


def test_another_backbone_is_refused_by_name(pretrained):
    with pytest.raises(UserError, match=r"does not fit the model(.|\n)*levels\.2\.blocks\.1"):
        load_into(model(depths=[1, 1, 2, 1]), pretrained)
    with pytest.raises(UserError, match="patch_embed"):
        load_into(model(channels=32, groups=[2, 4, 8, 16]), pretrained)


def test_rows_are_read_from_a_file(tmp_path):
    path = tmp_path / "rows.txt"
    path.write_text("4\n0\n2\n")
    assert read_rows(path, 3).tolist() == [4, 0, 2]
    with pytest.raises(UserError, match="3 rows for 4 classes"):
        read_rows(path, 4)
    path.write_text("four\n")
    with pytest.raises(UserError, match="one row number a line"):
        read_rows(path, 1)

"""The released layouts, in and out, strictly."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from data_pipeline.errors import UserError
from pretrain.models import InternImage, official


def test_what_is_loaded_is_exported_with_the_same_keys_shapes_and_bytes(golden):
    exported = official.state_dict(golden.build())
    assert set(exported) == set(golden.state)
    for key, value in golden.state.items():
        assert exported[key].dtype == value.dtype and exported[key].shape == value.shape, key
        assert exported[key].contiguous().numpy().tobytes() == value.numpy().tobytes(), key


@pytest.mark.parametrize(
    "key",
    ["levels.2.blocks.1.dcn.mask.weight", "levels.0.downsample.norm.1.bias", "patch_embed.conv1.weight", "head.bias"],
)
def test_a_missing_extra_or_misshapen_key_is_refused_by_name(golden_t, key):
    model = InternImage(**golden_t.arguments)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    value = golden_t.state[key]
    with pytest.raises(UserError, match=re.escape(f"missing: {key}")):
        official.load_state_dict(model, {k: v for k, v in golden_t.state.items() if k != key})
    with pytest.raises(UserError, match=re.escape(f"unexpected: {key}2")):
        official.load_state_dict(model, {**golden_t.state, key + "2": value})
    with pytest.raises(
        UserError, match=re.escape(f"shape: {key} is {[value.shape[0] + 1, *value.shape[1:]]} in the file")
    ):
        official.load_state_dict(model, {**golden_t.state, key: torch.zeros(value.shape[0] + 1, *value.shape[1:])})
    # a refused load leaves the model as it was
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_only_what_is_allowed_by_name_may_be_left_out(golden_t):
    model = InternImage(**{**golden_t.arguments, "num_classes": 3})
    own = model.head.weight.clone()
    with pytest.raises(UserError, match=r"shape: head\.weight"):
        official.load_state_dict(model, golden_t.state)
    listing = official.load_state_dict(model, golden_t.state, allow=("head.",))
    assert [key for key, _, _ in listing.reshaped] == ["head.weight", "head.bias"] and not listing.missing
    assert torch.equal(model.head.weight, own)
    assert torch.equal(model.conv_head.norm.running_var, golden_t.state["conv_head.1.0.running_var"])
    with pytest.raises(UserError, match=r"shape: head\.weight"):
        official.load_state_dict(model, golden_t.state, allow=("head",))


def test_rows_of_a_larger_classifier_become_those_of_a_smaller_one(golden_t):
    rows = torch.tensor([7, 0, 4])
    model = InternImage(**{**golden_t.arguments, "num_classes": 3})
    official.load_state_dict(model, golden_t.state, head_rows=rows)
    with torch.no_grad():
        torch.testing.assert_close(
            model.eval()(golden_t.image), golden_t.build()(golden_t.image)[:, rows], rtol=1e-5, atol=1e-6
        )
    for row in (10, -1):
        with pytest.raises(UserError, match=f"has 10 rows, row {row} was asked for"):
            official.load_state_dict(model, golden_t.state, head_rows=torch.tensor([0, row, 9]))


def test_offsets_are_loaded_also_where_their_masks_may_be_missing(golden_t):
    offset, mask = (f"levels.2.blocks.1.dcn.{part}.weight" for part in ("offset", "mask"))
    model = InternImage(**golden_t.arguments)
    layer = model.stages[2].blocks[1].dcn
    with torch.no_grad():
        layer.mask.weight.fill_(0.5)
    without = {key: value for key, value in golden_t.state.items() if key != mask}
    listing = official.load_state_dict(model, without, allow=(mask,))
    assert listing.missing == [mask] and not listing.unexpected and not listing.reshaped
    assert torch.equal(layer.offset.weight, golden_t.state[offset]) and layer.mask.weight.eq(0.5).all()


def test_hugging_faces_layout_is_read(golden):
    renamed = {
        "model." + key.replace(".gamma1", ".layer_scale1").replace(".gamma2", ".layer_scale2"): value
        for key, value in golden.state.items()
    }
    model = InternImage(**golden.arguments)
    official.load_state_dict(model, renamed)
    exported = official.state_dict(model)
    assert all(torch.equal(exported[key], value) for key, value in golden.state.items())


def test_the_427m_pretraining_layout_gives_the_online_encoder_and_the_category_classifier(golden_h):
    state = {}
    for key, value in golden_h.state.items():
        if key.startswith(("dcnv3_head_x", "clip_projector.")):
            state[key] = value
        elif key.startswith("fc_norm.0."):
            state["clip.classifier_ln." + key.removeprefix("fc_norm.0.")] = value
        elif key.startswith("head."):
            state["clip.classifier." + key.removeprefix("head.")] = value
        else:
            state["dcnv3." + key] = value
    momentum = {"mm_" + key: value + 1 for key, value in state.items()}
    rest = {"clip.transformer.resblocks.0.ln_1.weight": torch.ones(4), "decoder.mask_token": torch.ones(4)}
    model = InternImage(**golden_h.arguments)
    official.load_state_dict(model, {**momentum, **state, **rest})
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(golden_h.image), golden_h.build()(golden_h.image), rtol=0, atol=0)


def test_every_kind_of_file_is_read_alike(golden_t, tmp_path):
    torch.save({"model": golden_t.state}, tmp_path / "a.pth")
    save_file(golden_t.state, tmp_path / "b.safetensors")
    keys = sorted(golden_t.state)
    index = {}
    for number, part in enumerate((keys[::2], keys[1::2])):
        name = f"model-{number + 1:05}-of-00002.safetensors"
        save_file({key: golden_t.state[key] for key in part}, tmp_path / name)
        index.update(dict.fromkeys(part, name))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    for name in ("a.pth", "b.safetensors", "model.safetensors.index.json"):
        state = official.read(tmp_path / name)
        assert set(state) == set(golden_t.state)
        assert all(torch.equal(state[key], value) for key, value in golden_t.state.items())
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"its shard 'model-00002-of-00002\.safetensors' is missing"):
        official.read(tmp_path / "model.safetensors.index.json")
    (tmp_path / "b.safetensors").write_bytes((tmp_path / "b.safetensors").read_bytes()[:-100])
    with pytest.raises(UserError, match=r"b\.safetensors: not a readable file of weights"):
        official.read(tmp_path / "b.safetensors")

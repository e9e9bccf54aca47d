"""What leaves a run is the image encoder and nothing else, and it comes back bit for bit from every layout."""

import json

import pytest
import timm
import torch
from checkpoints import CLASSES, run_config, write_checkpoint
from safetensors import safe_open

from data_pipeline.errors import UserError
from pretrain.handoff import export, load_backbone, read_backbone
from pretrain.handoff.export import unlike_authors
from pretrain.models import VARIANTS, InternImage, create_model, official


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def expected_model(weights) -> InternImage:
    """Built apart from the hand-off: the arguments that the fake run's configuration amounts to."""
    model = InternImage(
        channels=16,
        depths=(1, 1, 2, 1),
        groups=(1, 2, 4, 8),
        num_classes=5,
        use_clip_projector=True,
        clip_embed_dim=64,
        clip_heads=4,
        head_hidden_size=32,
    )
    model.load_state_dict({n.removeprefix("image."): v for n, v in weights.items() if n.startswith("image.")})
    return model.eval()


@pytest.mark.parametrize(
    ("layout", "name"), [("safetensors", "model.safetensors"), ("official", "model.pth"), ("timm", "folder")]
)
def test_an_export_reads_back_bit_for_bit(layout, name, fake_run, tmp_path, image):
    run, weights = fake_run()
    written = export(run, layout, tmp_path / "out" / name)
    model = expected_model(weights)
    state = read_backbone(written).state
    expected = official.state_dict(model)
    if layout == "timm":
        state = timm.create_model(f"local-dir:{written}", pretrained=True).state_dict()
        expected = model.state_dict()
    assert set(state) == set(expected)
    assert all(torch.equal(state[key], value) for key, value in expected.items())


def test_teacher_text_and_decoder_stay_behind(fake_run, tmp_path):
    run, weights = fake_run()
    assert any(not name.startswith("image.") for name in weights)
    written = export(run, "official", tmp_path / "model.pth")
    state = torch.load(written, weights_only=True)
    assert set(state) == {"model", "internimage"}, "the weights, and how to build and feed the model"
    prefixes = {key.split(".")[0] for key in state["model"]}
    assert prefixes == {"patch_embed", "levels", "dcnv3_head_x3", "dcnv3_head_x4", "clip_projector", "fc_norm", "head"}


def test_a_safetensors_export_says_how_to_build_and_feed_the_model(fake_run, tmp_path, image):
    run, weights = fake_run()
    written = export(run, "safetensors", tmp_path / "model.safetensors")
    with safe_open(written, "pt") as file:
        described = json.loads(file.metadata()["internimage"])
    assert described["image_size"] == 64 and described["mean"] == [0.5, 0.4, 0.3]
    with torch.no_grad():
        torch.testing.assert_close(
            read_backbone(written).build()(image), expected_model(weights)(image), rtol=0, atol=0
        )


def test_the_timm_folder_gives_the_same_logits_and_what_timm_needs(fake_run, tmp_path, image):
    run, weights = fake_run()
    written = export(run, "timm", tmp_path / "folder")
    model = timm.create_model(f"local-dir:{written}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(image), expected_model(weights)(image), rtol=0, atol=0)
    assert model.pretrained_cfg["mean"] == [0.5, 0.4, 0.3] and model.pretrained_cfg["input_size"] == [3, 64, 64]
    features = timm.create_model(f"local-dir:{written}", pretrained=True, features_only=True)
    assert features.feature_info.channels() == [16, 32, 64, 128]


def test_a_pooled_head_trained_with_supervision_is_exported_with_its_running_statistics(fake_run, tmp_path):
    run, _ = fake_run(
        "supervised", lambda module: module.image.conv_head.norm.running_mean.fill_(0.25), use_clip_projector=False
    )
    state = torch.load(export(run, "official", tmp_path / "model.pth"), weights_only=True)["model"]
    assert state["conv_head.1.0.running_mean"].eq(0.25).all()
    assert state["conv_head.1.0.num_batches_tracked"].dtype == torch.int64


def test_a_new_classifier_keeps_its_own_weights_and_everything_else_is_loaded(fake_run, tmp_path):
    run, weights = fake_run()
    written = export(run, "safetensors", tmp_path / "model.safetensors")
    same = create_model("custom", **read_backbone(written).arguments)
    head = same.head.weight.clone()
    load_backbone(same, written, allow=("head.",))
    assert torch.equal(same.head.weight, head), "as many classes are not the same classes"
    model = create_model("custom", **{**read_backbone(written).arguments, "num_classes": 7})
    head = model.head.weight.clone()
    with pytest.raises(UserError, match=r"head\.weight is \[5, 32\] in the file, \[7, 32\] in the model"):
        load_backbone(model, written)
    load_backbone(model, written, allow=("head.",))
    assert torch.equal(model.head.weight, head)
    assert torch.equal(model.stem.conv1.weight, weights["image.stem.conv1.weight"])


def test_mistakes_are_named(fake_run, tmp_path):
    run, _ = fake_run()
    with pytest.raises(UserError, match="'caffe' is no format; known are safetensors, official, mmdet, timm, hf"):
        export(run, "caffe", tmp_path / "x")
    with pytest.raises(UserError, match="no such run"):
        export(tmp_path / "absent", "official", tmp_path / "x")
    (tmp_path / "broken.pth").write_bytes(b"not a zip")
    with pytest.raises(UserError, match=r"broken\.pth: not a readable file of weights"):
        read_backbone(tmp_path / "broken.pth")
    other = tmp_path / "other"
    write_checkpoint(other, run_config(), torch.nn.Linear(2, 2))
    with pytest.raises(UserError, match="hold no image encoder"):
        export(other, "official", tmp_path / "x")


def test_a_pickle_is_never_executed(tmp_path):
    import pickle

    class Boom:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    torch.save({"model": {"x": torch.zeros(1)}, "optimizer": Boom()}, tmp_path / "evil.pth", pickle_module=pickle)
    with pytest.raises(UserError, match=r"evil\.pth"):
        read_backbone(tmp_path / "evil.pth")
    assert not (tmp_path / "executed").exists()


def test_a_published_checkpoint_is_recognised_by_its_shapes(tmp_path):
    model = create_model("internimage_t", num_classes=11)
    torch.save({"model": official.state_dict(model)}, tmp_path / "internimage_t.pth")
    backbone = read_backbone(tmp_path / "internimage_t.pth")
    assert backbone.arguments["channels"] == 64 and backbone.arguments["num_classes"] == 11
    assert torch.equal(backbone.build().head.bias, model.head.bias)


@pytest.mark.parametrize("layout", ["safetensors", "official", "timm", "hf"])
def test_class_names_and_origin_travel_in_every_layout(layout, fake_run, tmp_path):
    run, _ = fake_run()
    lines: list[str] = []
    written = export(run, layout, tmp_path / f"out.{layout}", say=lines.append)
    assert lines[0] == "exported: run, step 1000, trained weights (the run keeps no EMA)"
    backbone = read_backbone(written)
    assert backbone.classes == CLASSES and backbone.mean == (0.5, 0.4, 0.3) and backbone.image_size == 64
    assert backbone.origin["task"]["preset"] == "m3i" and backbone.origin["images"] == 1000 * 256
    assert backbone.origin["sources"][0]["about"] == {"license": "CC-BY-4.0"}
    if layout == "timm":
        model = timm.create_model(f"local-dir:{written}", pretrained=True)
        assert tuple(model.pretrained_cfg["label_names"]) == CLASSES


def test_an_official_export_says_where_the_authors_code_cannot_build_the_model(fake_run, tmp_path):
    lines: list[str] = []
    run, _ = fake_run()
    export(run, "official", tmp_path / "small.pth", say=lines.append)
    assert lines[1].startswith("note: the authors' unedited code cannot build this model")
    assert "clip_embed_dim 64 (1024), head_hidden_size 32 (768), clip_heads 4 (16)" in lines[1]
    others: list[str] = []
    export(run, "safetensors", tmp_path / "small.safetensors", say=others.append)
    assert not any("unedited" in line for line in others), "which only the official layout has to say"
    for name, variant in VARIANTS.items():
        assert not unlike_authors(variant.arguments) and not unlike_authors(variant.arguments, stages_alone=True), name
    assert unlike_authors({"mask_activation": "sigmoid"}) == ["mask_activation sigmoid (softmax)"]
    without_centre = {"remove_center": True, "use_clip_projector": True, "clip_heads": 4}
    assert unlike_authors(without_centre) == ["clip_heads 4 (16)"]
    assert unlike_authors(without_centre, stages_alone=True) == ["remove_center True (False)"]


def test_a_detectors_checkpoint_gives_its_backbone_and_says_so(fake_run, tmp_path):
    run, weights = fake_run("supervised", use_clip_projector=False)
    state = official.state_dict(read_backbone(run).build())
    inside = {f"backbone.{key}": value for key, value in state.items() if not key.startswith("head.")}
    detector = {**inside, "neck.weight": torch.ones(2), "bbox_head.weight": torch.ones(2)}
    torch.save({"meta": {"epoch": 12}, "state_dict": detector}, tmp_path / "detector.pth")
    backbone = read_backbone(tmp_path / "detector.pth")
    assert backbone.source == (
        "detector.pth, state_dict (no averaged weights beside it), "
        f"entries under 'backbone.' ({len(inside)} of {len(inside) + 2})"
    )
    assert torch.equal(backbone.state["patch_embed.conv1.weight"], weights["image.stem.conv1.weight"])
    assert not any("neck" in key or "bbox" in key for key in backbone.state)


def test_a_folder_that_timm_saved_again_is_read_by_its_own_words(fake_run, tmp_path, image):
    run, _ = fake_run()
    model = timm.create_model(f"local-dir:{export(run, 'timm', tmp_path / 'folder')}", pretrained=True)
    model.reset_classifier(0)
    from timm.models import save_for_hf

    save_for_hf(model, tmp_path / "again", model_args=expected_arguments(model))
    again = read_backbone(tmp_path / "again")
    assert again.mean == (0.5, 0.4, 0.3) and again.classes is None
    with torch.no_grad():
        torch.testing.assert_close(again.build()(image), model.eval()(image), rtol=0, atol=0)


def expected_arguments(model: InternImage) -> dict[str, object]:
    return {k: v for k, v in model.arguments.items() if k not in ("num_classes", "global_pool", "in_chans")}

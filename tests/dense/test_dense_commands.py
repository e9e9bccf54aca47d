"""Every dense task from a source to its scores and predictions; what cannot serve a task is refused with the remedy."""

import json
from pathlib import Path

import numpy as np
import pytest
from dense_runs import LABEL_MAPS, SECTIONS, tiny
from dense_sets import CATEGORIES
from PIL import Image
from pycocotools import mask as rle

from data_pipeline.errors import UserError
from launch.cli import run
from pretrain.configuration import load_config, parse_config
from pretrain.evaluation import evaluate
from pretrain.evaluation.predict import predict_pictures
from pretrain.finetuning import finetune
from pretrain.report import write_report
from pretrain.tasks.task import main_score_of, task_of


@pytest.fixture(scope="module")
def source(coco_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose backbone the others start from."""
    output = tmp_path_factory.mktemp("source") / "run"
    assert finetune(tiny("detection", coco_set, steps=3), output=output) == 0
    return output


# Parts of other tasks here: the fine-tuning of `source`, and Mask2Former on objects.
OTHERS_PARTS = ("detection", "query_segmentation")


@pytest.mark.parametrize(
    "task", [pytest.param(task, marks=pytest.mark.slow) if task in OTHERS_PARTS else task for task in SECTIONS]
)
def test_a_task_goes_from_a_source_to_scores_and_predictions(
    task: str, source: Path, coco_set: Path, label_set: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = label_set if task in LABEL_MAPS else coco_set
    config, output = tiny(task, folder, steps=3), tmp_path / "run"
    assert finetune(config, source=source, output=output) == 0
    assert "started from run, step 3, EMA weights" in capfd.readouterr().err
    main = main_score_of(task_of(config))
    results = evaluate(output, folder, untrained=False, say=print)
    scores = {entry["name"]: entry["value"] for entry in results[main.evaluation]["scores"]}
    assert 0 <= scores[main.score] <= 1
    report = write_report(output).read_text()
    assert "Predictions beside the truth" in report and report.count('alt="predicted"') == 6

    pictures = folder.parent / "images"
    assert predict_pictures(output, [pictures], tmp_path / "found", least=0.0) == 8
    listed = json.loads((tmp_path / "found" / "pictures.json").read_text())
    names = [*CATEGORIES.values(), "ground"] if task in LABEL_MAPS else list(CATEGORIES.values())
    assert [entry["name"] for entry in listed["categories"]] == names
    sizes = {entry["id"]: (entry["height"], entry["width"]) for entry in listed["images"]}
    for entry in listed["images"]:
        with Image.open(tmp_path / "found" / entry["file_name"].replace(".jpg", ".png")) as drawn:
            assert drawn.size == (entry["width"], entry["height"])
    found = json.loads((tmp_path / "found" / "predictions.json").read_text())
    if task in LABEL_MAPS:
        values = np.asarray(Image.open(tmp_path / "found" / "0000.labels.png"))
        assert not found and values.shape == sizes[1] and values.max() < 4
    for one in found:
        assert one["category_id"] in CATEGORIES and 0 <= one["score"] <= 1 and min(one["bbox"][2:]) >= 0
        assert ("segmentation" in one) == (task in ("instance", "query_instance"))
        if "segmentation" in one:
            assert rle.decode(one["segmentation"]).shape == sizes[one["image_id"]]


def test_a_set_of_other_annotations_is_refused_with_the_remedy(coco_set: Path, label_set: Path, tmp_path: Path) -> None:
    for task, folder, remedy in (("instance", label_set, "--coco"), ("semantic", coco_set, "--label-maps")):
        with pytest.raises(UserError, match=f"task {task} learns from .* do not have: set; pack them .*{remedy}"):
            finetune(tiny(task, folder, steps=2), output=tmp_path / task)


def test_a_set_of_other_annotations_is_not_scored(source: Path, label_set: Path) -> None:
    with pytest.raises(UserError, match="has no objects: pack it with --coco"):
        evaluate(source, label_set, untrained=False)


def test_views_must_keep_their_shape(coco_set: Path, tmp_path: Path) -> None:
    config = tiny("instance", coco_set, steps=3)
    config.data.rectangle = None
    with pytest.raises(UserError, match=r"give data\.rectangle \(see configs/mask_rcnn_1x_coco\.yaml\)"):
        finetune(config, output=tmp_path / "run")


@pytest.mark.parametrize("change", ["views=2", "augmentation.rotate=10", "augmentation.erase=0.5"])
def test_a_view_that_boxes_cannot_follow_is_refused(change: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["finetune", "mask_rcnn_1x_coco", f"data.{change}", "--print-config"]) == 2
    assert "data.rectangle makes one view" in capsys.readouterr().err


def test_pretraining_is_no_fine_tuning(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="fine-tuning needs a task on annotated pictures"):
        finetune(load_config("demo"), output=tmp_path / "run")


def test_what_is_no_picture_is_an_error_of_predict(source: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.jpg").write_text("no picture")
    for path, message in ((tmp_path / "notes.jpg", "cannot be read as a picture"), (tmp_path / "gone.jpg", "no such")):
        with pytest.raises(UserError, match=f"{path.name}: {message}"):
            predict_pictures(source, [path], tmp_path / "out")


def test_predictions_cost_neither_pictures_nor_each_other(source: Path, coco_set: Path, tmp_path: Path) -> None:
    picture = Image.open(sorted((coco_set.parent / "images").iterdir())[0])
    for name in ("one/a.png", "one/a.jpg", "two/a.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture.save(tmp_path / name)
    before = (tmp_path / "one/a.png").read_bytes()
    with pytest.raises(UserError, match=r"written over the picture .*one/a\.png; name another --to"):
        predict_pictures(source, [tmp_path / "one/a.png"], tmp_path / "one")
    assert (tmp_path / "one/a.png").read_bytes() == before
    assert predict_pictures(source, [tmp_path / "one"] * 2, tmp_path / "to") == 2
    assert sorted(path.name for path in (tmp_path / "to").glob("*.png")) == ["a.jpg.png", "a.png.png"]
    with pytest.raises(UserError, match=r"one/a\.jpg and .*two/a\.jpg would both be drawn into .*a\.jpg\.png"):
        predict_pictures(source, [tmp_path / "one/a.jpg", tmp_path / "two/a.jpg"], tmp_path / "both")


def test_a_classifier_predicts_the_classes_of_a_picture(tmp_path: Path) -> None:
    import torch

    overrides = {"channels": 16, "depths": [1, 1, 1, 1], "groups": [1, 2, 4, 8]}
    config = parse_config(
        {
            "model": {"name": "custom", "num_classes": 7, "overrides": overrides},
            "task": {"name": "classification"},
            "data": {"image_size": 32, "views": 1, "sources": [{"path": "x"}]},
            "schedule": {"steps": 1},
        }
    )
    torch.manual_seed(0)
    module = task_of(config).build(config.model, config.data, classes=7).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)  # the view is the picture itself
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    words = {"classes": list("abcdefg"), "image_id": 4, "categories": range(10, 17), "least": 1.0}
    with torch.no_grad():
        found = task_of(config).predict(module, (tmp_path / "picture.png").read_bytes(), config, **words)
        plain = (torch.from_numpy(pixels).double() / 255 - torch.tensor(config.data.mean)) / torch.tensor(
            config.data.std
        )
        chances = module.image(plain.permute(2, 0, 1)[None].float())[0].softmax(0)
    assert [one["category_id"] - 10 for one in found.results] == chances.argsort(descending=True)[:5].tolist()
    assert [one["score"] for one in found.results] == pytest.approx(
        chances.sort(descending=True).values[:5].tolist(), abs=1e-5
    )
    assert found.drawn.shape == pixels.shape and not np.array_equal(found.drawn, pixels), "the best class is drawn"


def test_shards_are_packed_by_the_command_line(coco_files, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, file = coco_files()
    words = ["shards", "pack", str(images), str(tmp_path / "set"), "--coco", str(file), "--workers", "1", "--json"]
    assert run(words) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["packed"] == 4 and said["objects"] > 4 and said["left_out"] == {}
    assert run([*words, "--label-maps", str(images)]) == 2 and run([*words[:-3], "--root", str(images)]) == 2


@pytest.mark.parametrize(
    "option",
    [
        ("--retry", "image_missing"), ("--shuffle", "1"), ("--captionless", "reject"), ("--columns", "image"),
        ("--max-caption", "9"), ("--labels", "none"), ("--caption-column", "none"), ("--parts", "2"),
        ("--reduce-zero-label",), ("--classes", "names.txt"),
    ],
)  # fmt: skip
def test_options_without_effect_on_objects_are_refused(
    option: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("names.txt").write_text("a\n")
    assert run(["shards", "pack", "images", "set", "--coco", "instances.json", *option]) == 2
    assert f"{option[0]}: no effect beside --coco" in capsys.readouterr().err


@pytest.mark.parametrize("task", ["query_detection", "query_instance"])
def test_a_plan_counts_heads_of_queries_as_pytorch_keeps_them(task: str, tmp_path: Path) -> None:
    """On the CPU with real tensors, in training: what autograd saves of the whole, less what the image model saves."""
    import torch

    from launch.planning import count

    config = tiny(task, tmp_path)
    config.model.overrides["drop_path_rate"] = 0.0
    module = task_of(config).build(config.model, config.data, classes=3)
    values, multiply_adds = module.to("meta").head_costs(96)
    assert count(config, 3).transformers.kept == values
    module = task_of(config).build(config.model, config.data, classes=3).train()
    images, own = torch.randn(1, 3, 96, 96), {p.untyped_storage().data_ptr() for p in module.parameters()}

    def kept(call) -> float:
        found = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            found[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = call()
        assert out is not None
        return sum(t.untyped_storage().nbytes() / 4 for where, t in found.items() if where not in own)

    whole = (lambda: module._outputs(images, [(96, 96)])) if task == "query_detection" else (lambda: module.net(images))
    found = kept(whole) - kept(lambda: module.features(images))
    assert multiply_adds > 0 and values == pytest.approx(found, rel=0.1)


@pytest.mark.parametrize("task", ["instance", "semantic"])
def test_a_plan_counts_the_heads_as_pytorch_keeps_them(task: str, tmp_path: Path) -> None:
    """On the CPU with real tensors: what autograd saves of the same call, parameters and inputs left out."""
    import torch

    from launch.planning import count

    config = tiny(task, tmp_path)
    module = task_of(config).build(config.model, config.data, classes=3)
    values, multiply_adds = module.to("meta").head_costs(96)
    counts = count(config, 3)
    assert counts.image_size == 96 and counts.transformers.kept == values > 0 and multiply_adds > 0
    module = task_of(config).build(config.model, config.data, classes=3).train()
    maps = [torch.randn(1, width, 24 >> s, 24 >> s, requires_grad=True) for s, width in enumerate(module.widths)]
    own = {p.untyped_storage().data_ptr() for p in [*module.parameters(), *maps]}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        if task == "semantic":
            for head in (module.head, module.auxiliary_head):
                larger = torch.nn.functional.interpolate(head(maps), (96, 96), mode="bilinear", align_corners=False)
                torch.nn.functional.cross_entropy(larger, torch.zeros(1, 96, 96, dtype=torch.int64))
        else:
            pyramid = module.fpn({str(level): one for level, one in enumerate(maps)})
            module.rpn.head(list(pyramid.values()))
            module.roi_heads.box_predictor(module.roi_heads.box_head(torch.randn(512, 32, 7, 7, requires_grad=True)))
            mask = module.roi_heads.mask_head(torch.randn(128, 32, 14, 14, requires_grad=True))
            module.roi_heads.mask_predictor(mask)
    found = sum(t.untyped_storage().nbytes() / 4 for where, t in kept.items() if where not in own)
    assert values == pytest.approx(found, rel=0.1)

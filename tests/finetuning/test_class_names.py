"""The names of a classifier's rows travel with its weights: nothing depends on where the training set was."""

import shutil
from pathlib import Path

import pytest
import torch
from evaluation_shapes import write_set
from finetuning_configurations import tiny_configuration
from safetensors.torch import save_file

from data_pipeline.errors import UserError
from pretrain.evaluation import evaluate, load_module
from pretrain.handoff import export, read_backbone
from pretrain.models import official
from pretrain.training import run
from pretrain.training.checkpoint.disk import mark_best
from pretrain.training.initialize import initialize_from

PERMUTED = ("blue", "red", "green")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of circles by colour, trained until it tells some apart; its training set is gone."""
    folder = tmp_path_factory.mktemp("classifier")
    shapes = write_set(folder / "train")
    assert run(tiny_configuration(shapes, "supervised", 20, training__ema={"decay": 0.0}), folder / "run") == 0
    shutil.rmtree(shapes)
    return folder / "run"


def per_class(results: dict[str, dict]) -> dict[str, float]:
    return {name: row["value"] for name, row in results["top1"]["per_class"].items()}


def test_scores_do_not_depend_on_folder_or_order(classifier, tmp_path, monkeypatch):
    known = per_class(evaluate(classifier, write_set(tmp_path / "known"), untrained=False))
    assert len(set(known.values())) > 1 or set(known.values()) == {1.0}, "a model that knows something"
    monkeypatch.chdir(tmp_path)
    write_set(tmp_path / "train", classes=PERMUTED)  # where the run's configuration, relative or not, might look
    assert per_class(evaluate(classifier, "train", untrained=False)) == known


def test_other_class_names_are_refused_with_both_lists(classifier, tmp_path):
    azure = write_set(tmp_path / "azure", classes=("red", "green", "azure"), labels=("red", "green", "azure"))
    both = r"top1: 1 of 3 classes.*azure\n  wanted \(3\): red, green, azure\n  the model \(3\): red, green, blue"
    with pytest.raises(UserError, match=both):
        evaluate(classifier, azure)
    lines: list[str] = []
    with pytest.raises(UserError, match=both):
        evaluate(classifier, azure, tasks=["top1"], say=lines.append)
    assert lines == [f"scored: {classifier}/checkpoints/step-00000020, step 20, EMA weights"]


def test_what_is_left_out_is_said(pretrained, tmp_path):
    captioned = write_set(tmp_path / "azure", classes=("red", "green", "azure"), labels=("red", "green", "azure"))
    lines: list[str] = []
    assert list(evaluate(pretrained, captioned, untrained=False, output=tmp_path, say=lines.append)) == [
        "retrieval",
        "zero-shot",
    ]
    assert lines[1].startswith("left out: top1: 1 of 3 classes")


def test_names_and_origin_are_in_an_export(classifier, tmp_path):
    backbone = read_backbone(export(classifier, "safetensors", tmp_path / "model.safetensors"))
    assert backbone.classes == ("red", "green", "blue")
    assert backbone.origin["task"]["name"] == "classification" and backbone.origin["step"] == 20
    (source,) = backbone.origin["sources"]
    assert source["samples"] == 12 and source["about"] == {"attribution": "drawn by this test"}


def test_a_run_does_not_go_on_with_labels_that_mean_other_classes(tmp_path):
    shapes = write_set(tmp_path / "train")
    assert run(tiny_configuration(shapes, "supervised", 2, training__stop_after=1), tmp_path / "run") == 75
    manifest = shapes / "manifest.json"
    names = manifest.read_text()
    manifest.write_text(names.replace('"red"', '"x"').replace('"green"', '"red"').replace('"x"', '"green"'))
    with pytest.raises(UserError, match=r"another order(.|\n)*red, green, blue\n.*green, red, blue"):
        run(tiny_configuration(shapes, "supervised", 2), tmp_path / "run")
    shutil.move(shapes, tmp_path / "moved")
    (tmp_path / "moved" / "manifest.json").write_text(names)
    assert run(tiny_configuration(tmp_path / "moved", "supervised", 2), tmp_path / "run") == 0


def test_a_new_run_takes_a_classifier_of_the_same_classes_alone(classifier):
    trained = load_module(classifier).module
    config = tiny_configuration(Path("nowhere"), "supervised", 1)

    def started(classes: tuple[str, ...] | None) -> tuple[list[str], torch.nn.Module]:
        fresh = config.task.build(config.model, config.data, classes=3)
        return initialize_from(fresh, classifier, classes), fresh

    kept, module = started(("red", "green", "blue"))
    assert kept == [] and torch.equal(module.image.head.weight.cpu(), trained.image.head.weight.cpu())
    for classes in (PERMUTED, ("red", "green", "azure"), None):
        kept, module = started(classes)
        assert kept == ["image.head.weight", "image.head.bias"]
        assert not torch.equal(module.image.head.weight.cpu(), trained.image.head.weight.cpu())


@pytest.mark.parametrize("source", ["run", "file"])
@pytest.mark.parametrize("change", [{"depths": (1, 2, 1, 1)}, {"channels": 32}], ids=["deeper", "wider"])
def test_a_new_run_takes_no_encoder_of_another_model(classifier, tmp_path, source, change):
    config = tiny_configuration(Path("nowhere"), "supervised", 1)
    shape = config.model.model_copy(update={"overrides": {**config.model.overrides, **change}})
    fresh = config.task.build(shape, config.data, classes=3)
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    path = classifier
    if source == "file":
        path = tmp_path / "weights.safetensors"
        save_file(official.state_dict(load_module(classifier).module.image.cpu()), path)
    with pytest.raises(UserError, match=r"of another image model:\n(missing|shape): .*(.|\n)*Set model.name"):
        initialize_from(fresh, path, ("red", "green", "blue"))
    assert all(torch.equal(value, before[name]) for name, value in fresh.state_dict().items())


def test_the_best_checkpoint_is_scored_where_there_is_one(tmp_path):
    shapes = write_set(tmp_path / "train")
    config = tiny_configuration(shapes, "supervised", 3, checkpoint__every_steps=1, checkpoint__keep=9)
    assert run(config, tmp_path / "run") == 0

    def scored(**choice: str) -> str:
        lines: list[str] = []
        results = evaluate(tmp_path / "run", shapes, untrained=False, say=lines.append, **choice)
        assert f"/{results['top1']['checkpoint'].removesuffix(' (best)').replace(' ', '-0000000')}," in lines[0]
        return results["top1"]["checkpoint"]

    assert scored() == scored(choice="latest") == "step 3"
    with pytest.raises(UserError, match="no evaluation has chosen a best checkpoint; there are step 3, step 2, step 1"):
        scored(choice="best")
    mark_best(tmp_path / "run", 2)
    assert scored() == scored(choice="best") == scored(choice="2") == "step 2 (best)"
    assert scored(choice="latest") == "step 3" and scored(choice="1") == "step 1"
    assert read_backbone(tmp_path / "run").origin["step"] == 2
    for choice, message in (("7", "no complete checkpoint of step 7"), ("newest", "choose best, latest or the number")):
        with pytest.raises(UserError, match=message):
            scored(choice=choice)
    with pytest.raises(UserError, match="is one checkpoint"):
        evaluate(tmp_path / "run/checkpoints/step-00000001", shapes, choice="best")

"""Fine-tuning as a run: what it starts from, that it resumes, what it refuses, and its evaluation."""

import json

import pytest
import torch
from finetuning_configurations import tiny_configuration

from data_pipeline.errors import UserError
from pretrain.evaluation import evaluate, load_module, read_results, value_of
from pretrain.finetuning import finetune, train_to_plateau
from pretrain.report import write_report
from pretrain.training.checkpoint.disk import load_weights


def test_without_a_step_the_weights_are_those_of_the_source(finetuning, pretrained, tmp_path):
    """At rate 0 nothing moves: what the run ends with is what it started from, averaged weights included."""
    assert finetune(finetuning(1, optimizer__lr=0.0), source=pretrained, output=tmp_path / "run") == 0
    trained, _ = load_weights(pretrained, "ema")
    for which in ("model", "ema"):
        tuned, _ = load_weights(tmp_path / "run", which)
        assert set(tuned) == {name for name in trained if name.startswith("image.")}
        same = {name for name, value in tuned.items() if torch.equal(value, trained[name])}
        assert set(tuned) - same == {"image.head.weight", "image.head.bias"}
        assert not torch.equal(tuned["image.head.weight"], trained["image.head.weight"])


def test_without_a_source_the_weights_are_random(finetuning, pretrained, tmp_path):
    assert finetune(finetuning(1, optimizer__lr=0.0), output=tmp_path / "run") == 0
    trained, _ = load_weights(pretrained, "ema")
    fresh, _ = load_weights(tmp_path / "run")
    assert not torch.equal(fresh["image.stem.conv1.weight"], trained["image.stem.conv1.weight"])


def test_a_stopped_fine_tuning_ends_where_an_unbroken_one_ends(finetuning, pretrained, tmp_path):
    changes = {"optimizer__layer_decay": 0.8, "optimizer__offset_lr_scale": 0.1}
    assert finetune(finetuning(4, **changes), source=pretrained, output=tmp_path / "unbroken") == 0
    assert finetune(finetuning(4, training__stop_after=2, **changes), source=pretrained, output=tmp_path / "run") == 75
    assert finetune(finetuning(4, **changes), source=pretrained, output=tmp_path / "run") == 0
    for which in ("model", "ema"):
        unbroken, _ = load_weights(tmp_path / "unbroken", which)
        resumed, _ = load_weights(tmp_path / "run", which)
        assert unbroken.keys() == resumed.keys() and all(torch.equal(unbroken[k], resumed[k]) for k in unbroken)


def test_another_task_and_a_missing_source_are_refused(finetuning, pretrained, shapes, tmp_path):
    config = finetuning(1)
    with pytest.raises(UserError, match="does not exist"):
        finetune(config, source=tmp_path / "absent", output=tmp_path / "run")
    with pytest.raises(UserError, match="no weights to take them from"):
        finetune(config, output=tmp_path / "run", head_rows=tmp_path / "rows.txt")
    with pytest.raises(UserError, match="'classification'"):
        finetune(tiny_configuration(shapes, "clip", 1), source=pretrained, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_colours_are_learnt_to_the_plateau_and_the_run_is_reported(finetuning, pretrained, shapes, tmp_path):
    config = finetuning(60)
    plateau = train_to_plateau(
        config, source=pretrained, output=tmp_path / "run", validation=shapes, segment_steps=20, patience=1
    )
    assert plateau.validation == 1.0  # three colours are soon told apart
    assert plateau.history[0][0] == 20 and plateau.step == max(plateau.history, key=lambda h: (h[1], -h[0]))[0]
    results = evaluate(plateau.checkpoint, shapes, label="finetuned")
    assert list(results) == ["finetuned-top1"] == list(read_results(tmp_path / "run"))
    assert value_of(results["finetuned-top1"], "top1") == 1.0
    assert results["finetuned-top1"]["scores"][0]["beside"]["untrained"] <= 1
    page = write_report(tmp_path / "run").read_text()
    assert "top-1 accuracy" in page and "resume" in page


def test_a_search_for_the_plateau_starts_from_rows_of_the_classifier(finetuning, pretrained, shapes, tmp_path):
    """At rate 0 nothing moves: the classifier's rows are those of the source, which learned classes of these names."""
    settings = {"validation": shapes, "segment_steps": 1, "head_rows": "names"}
    train_to_plateau(finetuning(1, optimizer__lr=0.0), source=pretrained, output=tmp_path / "run", **settings)
    trained, _ = load_weights(pretrained, "ema")
    tuned, _ = load_weights(tmp_path / "run", "ema")
    assert torch.equal(tuned["image.head.weight"], trained["image.head.weight"])


def test_every_score_of_a_pretrained_run_is_written_into_it(pretrained, shapes):
    results = evaluate(pretrained, shapes)
    assert list(results) == ["retrieval", "zero-shot", "top1"]
    for result in read_results(pretrained).values():
        json.dumps(result, allow_nan=False)
        for entry in result["scores"]:
            assert 0 <= entry["value"] <= 1 and 0 < entry["chance"] <= 1 and "untrained" in entry["beside"]


def test_tasks_that_do_not_exist_or_do_not_fit_are_refused(pretrained, shapes, tmp_path):
    with pytest.raises(UserError, match="'recall'"):
        evaluate(pretrained, shapes, tasks=["recall"])
    with pytest.raises(UserError, match="is no run"):
        evaluate(tmp_path, shapes)


def test_averaged_and_trained_weights_are_told_apart(pretrained):
    averaged = load_module(pretrained, "ema").module
    trained = load_module(pretrained, "model").module
    for task, which in ((averaged, "ema"), (trained, "model")):
        weights, _ = load_weights(pretrained, which)
        assert all(torch.equal(value.cpu(), weights[name]) for name, value in task.state_dict().items())
    assert not torch.equal(averaged.image.head.weight, trained.image.head.weight)

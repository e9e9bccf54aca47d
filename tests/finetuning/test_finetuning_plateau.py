"""The decisions around a plateau, with training and scoring replaced by a script."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from finetuning_configurations import tiny_configuration

import pretrain.evaluation
import pretrain.training.checkpoint.disk
from data_pipeline.errors import StoppedError, UserError
from pretrain.finetuning import has_plateaued, train_to_plateau
from pretrain.finetuning.comparison import arms, comparison_result, run_arm, spread, verdict
from pretrain.finetuning.derive import classifier_config
from pretrain.tasks.classification.task import Classification
from pretrain.training import validation
from pretrain.training.validation import best_index


@pytest.mark.parametrize(
    ("scores", "patience", "reached"),
    [
        ([], 1, False),
        ([0.5], 1, False),
        ([0.5, 0.5], 1, True),
        ([0.5, 0.6], 1, False),
        ([0.5, 0.4, 0.6], 2, False),
        ([0.5, 0.4, 0.5], 2, True),
        ([0.1, 0.5, 0.4, 0.4], 3, False),
        ([0.5, 0.1, 0.4, 0.4], 3, True),
    ],
)
def test_a_plateau_is_patience_scores_without_a_new_best(scores, patience, reached):
    assert has_plateaued(scores, patience) is reached


def test_a_gain_can_be_too_small_to_count():
    assert has_plateaued([0.5, 0.52], 1, least_gain=0.03) and not has_plateaued([0.5, 0.54], 1, least_gain=0.03)
    with pytest.raises(ValueError, match="patience"):
        has_plateaued([0.5], 0)


def test_of_equal_scores_the_least_trained_is_best():
    assert best_index([0.1, 0.5, 0.3, 0.5]) == 1


class Script:
    """Training that notes what it was asked, and scores that follow a list by segment."""

    def __init__(self, monkeypatch, scores):
        self.scores, self.trained, self.scored, self.best = scores, [], [], []
        monkeypatch.setattr(pretrain.evaluation, "load_module", self.load)
        monkeypatch.setattr(Classification, "evaluate", self.evaluate)
        monkeypatch.setattr(validation, "mark_best", lambda run, step: self.best.append(step))
        monkeypatch.setattr(
            validation,
            "complete_checkpoints",
            lambda run: [SimpleNamespace(step=step) for step in {self.saved, *self.best}],
        )
        monkeypatch.setattr(
            pretrain.training.checkpoint.disk, "find_checkpoint", lambda run: SimpleNamespace(step=self.saved)
        )

    def train(self, config, source, output):
        output.mkdir(parents=True, exist_ok=True)
        self.trained.append((config, source, output))
        self.saved = config.training.stop_after or config.schedule.steps
        return 75 if config.training.stop_after else 0

    def load(self, path, which, choice="auto"):
        """A segment is scored as it stands, also where an earlier one is the best so far."""
        assert choice == "latest" or Path(path).name.startswith("step-")
        return SimpleNamespace(module=Path(path), config=None, classes=None)

    def evaluate(self, name, task, folder, config, *, classes, batch_size):
        self.scored.append((task, folder))
        if callable(self.scores):
            return self.scores(task, folder)
        value = self.scores[len(self.scored) - 1]
        return {"scores": [{"name": "top1", "value": value}]}


def test_training_goes_on_until_validation_stops_rising(monkeypatch, finetuning, tmp_path):
    script = Script(monkeypatch, [0.2, 0.5, 0.5, 0.4, 0.9])
    plateau = train_to_plateau(
        finetuning(100),
        source=None,
        output=tmp_path / "run",
        validation="val",
        segment_steps=10,
        patience=2,
        train=script.train,
    )
    assert (plateau.step, plateau.validation, plateau.reached) == (20, 0.5, True)
    assert plateau.history == ((10, 0.2), (20, 0.5), (30, 0.5), (40, 0.4))
    assert [c.training.stop_after for c, *_ in script.trained] == [10, 20, 30, 40]
    assert {c.schedule.name for c, *_ in script.trained} == {"constant"}
    assert script.best == [10, 20, 20, 20]
    assert plateau.checkpoint == tmp_path / "run/checkpoints/step-00000020"


def test_the_longest_length_ends_it_without_a_plateau(monkeypatch, finetuning, tmp_path):
    script = Script(monkeypatch, [0.1, 0.2, 0.3])
    plateau = train_to_plateau(
        finetuning(25), source=None, output=tmp_path / "run", validation="val", segment_steps=10, train=script.train
    )
    assert (plateau.step, plateau.reached) == (25, False)
    assert [c.training.stop_after for c, *_ in script.trained] == [10, 20, None]


def test_a_killed_search_goes_on_after_its_last_finished_segment(monkeypatch, finetuning, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/validation.json").write_text(json.dumps([{"step": 10, "top1": 0.6}]))
    script = Script(monkeypatch, [0.5])
    plateau = train_to_plateau(
        finetuning(100),
        source=None,
        output=tmp_path / "run",
        validation="val",
        segment_steps=10,
        patience=1,
        train=script.train,
    )
    assert [c.training.stop_after for c, *_ in script.trained] == [20] and plateau.step == 10


def test_no_plateau_counts_before_the_least_length(monkeypatch, finetuning, tmp_path):
    """Untrained weights stand at chance for a while; that is no plateau."""
    script = Script(monkeypatch, [0.1, 0.1, 0.1, 0.1, 0.7, 0.7, 0.7])
    plateau = train_to_plateau(
        finetuning(100),
        source=None,
        output=tmp_path / "run",
        validation="val",
        segment_steps=10,
        patience=2,
        least_steps=50,
        train=script.train,
    )
    assert (plateau.step, plateau.reached, plateau.history[-1]) == (50, True, (70, 0.7))


def test_a_stop_on_request_is_no_finished_segment(monkeypatch, finetuning, tmp_path):
    script = Script(monkeypatch, [0.2, 0.5])

    def stopped_at_15(config, source, output):
        code = script.train(config, source, output)
        script.saved = min(script.saved, 15)
        return code

    settings = {"source": None, "output": tmp_path / "run", "validation": "val", "segment_steps": 10}
    with pytest.raises(StoppedError, match="step 15"):
        train_to_plateau(finetuning(20), **settings, train=stopped_at_15)
    assert json.loads((tmp_path / "run/validation.json").read_text()) == [{"step": 10, "top1": 0.2}]
    assert train_to_plateau(finetuning(20), **settings, train=script.train).history == ((10, 0.2), (20, 0.5))


def test_a_failed_segment_is_told(monkeypatch, finetuning, tmp_path):
    Script(monkeypatch, [])
    with pytest.raises(UserError, match="exit code 4"):
        train_to_plateau(
            finetuning(20), source=None, output=tmp_path, validation="val", segment_steps=10, train=lambda *_: 4
        )


def test_random_weights_train_without_what_protects_trained_ones(finetuning, tmp_path):
    config = finetuning(10, optimizer__layer_decay=0.8, optimizer__offset_lr_scale=0.1)
    pretrained, random = arms(config, tmp_path, [1e-3, 2e-3], [4e-4])
    assert list(pretrained.candidates) == ["lr 0.002", "lr 0.0004"] and pretrained.source == tmp_path
    assert [c.optimizer.lr for c in pretrained.candidates.values()] == [2e-3, 4e-4]
    assert [c.optimizer.lr for c in random.candidates.values()] == [2e-3, 1e-3]
    assert {c.optimizer.layer_decay for c in pretrained.candidates.values()} == {0.8}
    assert list(random.candidates) == ["lr 0.002", "lr 0.001"] and random.source is None
    assert {c.optimizer.layer_decay for c in random.candidates.values()} == {1.0}
    assert config.optimizer.layer_decay == 0.8


def test_candidates_are_chosen_on_validation_and_held_out_is_scored_once_a_seed(monkeypatch, finetuning, tmp_path):
    """The held-out set prefers the candidate that validation does not; validation must win."""

    def score(run, folder):
        good = "lr-0.001" in str(run)
        value = (0.6 if good else 0.5) if folder == "val" else (0.1 if good else 0.9)
        return {"title": "t", "scores": [{"name": n, "value": value} for n in ("top1", "mean_per_class")]}

    script = Script(monkeypatch, score)
    _, random = arms(finetuning(20), tmp_path, [1e-3])
    found = run_arm(
        random,
        output=tmp_path,
        validation="val",
        held_out="test",
        seeds=(0, 1, 2),
        segment_steps=10,
        patience=1,
        train=script.train,
    )
    assert found["chosen"] == "lr 0.001" and found["mean"] == pytest.approx(0.1)
    assert [folder for _, folder in script.scored].count("test") == 3
    assert {c.training.seed for c, _, o in script.trained if "lr-0.001" in str(o)} == {0, 1, 2}
    assert {c.training.seed for c, _, o in script.trained if "lr-0.002" in str(o)} == {0}


def test_a_gain_must_exceed_the_range_over_seeds_of_both_sides():
    assert spread([0.5, 0.6, 0.55]) == pytest.approx({"mean": 0.55, "least": 0.5, "most": 0.6, "range": 0.1})
    assert verdict(spread([0.8, 0.82]), spread([0.5, 0.6]))["above_range"] is True
    assert verdict(spread([0.62, 0.62]), spread([0.5, 0.6]))["above_range"] is False


def test_both_sides_make_one_result():
    def arm(values):
        scores = [{"name": "top1", "value": 0.0, "beside": {"largest category": 0.2}}, {"name": "top5", "value": 1}]
        runs = [{"seed": i, "top1": v} for i, v in enumerate(values)]
        return {"runs": runs, **spread(values), "chosen": "lr", "result": {"title": "x", "scores": scores}}

    result = comparison_result(arm([0.6, 0.7]), arm([0.4, 0.5]))
    (entry,) = result["scores"]
    assert entry["value"] == pytest.approx(0.65)
    assert entry["beside"] == {"largest category": 0.2, "from random weights": pytest.approx(0.45)}
    assert result["settings"]["seeds"] == [0, 1] and result["settings"]["above_range"] is True


def test_a_pretraining_configuration_gives_that_of_its_fine_tuning(shapes):
    pretraining = tiny_configuration(shapes, "m3i", 2)
    config = classifier_config(pretraining, train="labels", steps=30, changes={"optimizer.lr": 5e-4})
    assert config.task.name == "classification" and config.data.views == 1
    assert config.model.overrides["use_clip_projector"] and config.model.overrides["head_hidden_size"] == 32
    assert [source.path for source in config.data.sources] == ["labels"]
    assert (config.data.image_size, config.optimizer.lr, config.schedule.steps) == (32, 5e-4, 30)
    with pytest.raises(UserError, match=r"optimizer\.learning"):
        classifier_config(pretraining, train="labels", steps=30, changes={"optimizer.learning": 1})

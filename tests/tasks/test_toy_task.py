"""A task from outside the package trains, stops, resumes and is scored, and training knows nothing of it."""

import ast
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from data_pipeline.errors import UserError
from pretrain.configuration import RunConfig, load_config, parse_config
from pretrain.evaluation import evaluate, read_results
from pretrain.training import run
from pretrain.training.checkpoint.disk import load_weights

TOY = Path(__file__).with_name("toy_task.py")


@pytest.fixture
def toy(tiny_run: Callable[..., Path]) -> RunConfig:
    """The tiny run's data and schedule, and the toy in the place of its task."""
    raw = load_config(str(tiny_run())).model_dump(mode="json")
    raw |= {"task": {"name": "toy_task:Toy", "width": 3}, "schedule": {"steps": 6}}
    raw["training"] |= {"batch_size": 4, "log_every": 1, "ema": {"decay": 0.5}}
    return parse_config(raw)


def test_a_task_from_outside_trains_stops_resumes_and_is_scored(toy: RunConfig, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(toy, whole) == 0
    halted = toy.model_copy(update={"training": toy.training.model_copy(update={"stop_after": 3})})
    assert run(halted, parts) == 75
    assert run(toy, parts) == 0
    first, again = load_weights(whole)[0], load_weights(parts)[0]
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)
    assert first["line.0.weight"].shape == (3, 2), "the task's own setting reached its module"
    data = toy.data.sources[0].path
    (entry,) = evaluate(parts, data)["blue"]["scores"]
    assert entry["name"] == "closeness" and "untrained" in entry["beside"]
    assert read_results(parts)["blue"]["scores"][0]["value"] == entry["value"]
    with pytest.raises(UserError, match="evaluation 'retrieval': task toy_task:Toy has blue"):
        evaluate(parts, data, tasks=["retrieval"])


def test_the_toy_needs_nothing_of_training() -> None:
    imported = [node.module for node in ast.walk(ast.parse(TOY.read_text())) if isinstance(node, ast.ImportFrom)]
    assert not [module for module in imported if module and module.startswith("pretrain.training")]


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"name": "pretrainig"}, "task.name 'pretrainig'.*Did you mean 'pretraining'"),
        ({"name": "toy_task:Absent"}, "cannot be imported.*Absent"),
        ({"name": "no_such_module:Task"}, "cannot be imported.*no_such_module"),
        ({"name": "pathlib:Path"}, "is no task"),
        ({"name": "toy_task:Toy", "widht": 4}, "'task.widht'. Did you mean 'task.width'"),
        ({"preset": "supervised"}, "task to {name: classification}"),
        ({"preset": "m4i"}, "choose one of m3i"),
        ({"name": "classification", "decoder": {}}, "unknown key 'task.decoder'"),
    ],
)
def test_a_wrong_task_section_is_refused_by_name(task: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_config({"task": task, "data": {"sources": [{"path": "x"}]}, "schedule": {"steps": 1}})


@pytest.mark.parametrize(
    ("old", "message"),
    [
        ({"objective": {"embed_dim": 9}}, "'objective.embed_dim' is now 'task.embed_dim'"),
        ({"objective": {"preset": "supervised", "mixup": 1}}, "supervised' is now task: {name: classification}"),
        ({"data": {"tokenizer": "open_clip", "sources": [{"path": "x"}]}}, "'data.tokenizer' no longer exists"),
    ],
)
def test_a_key_of_an_earlier_version_names_the_one_that_took_its_place(old: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_config({"data": {"sources": [{"path": "x"}]}, "schedule": {"steps": 1}, **old})


def test_a_loss_that_the_data_switch_off_is_told_and_so_are_labels_that_are_not_there(
    tiny_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tiny set has captions and no labels."""
    from pretrain.report import write_report
    from pretrain.training.logging.kinds import EventKind

    config = load_config(str(tiny_run("schedule.steps=1", "training.log_every=1")))
    assert run(config, tmp_path / "run") == 0
    assert "the category loss is off" in capsys.readouterr().err
    assert f'"kind": "{EventKind.NOTICE}"' in (tmp_path / "run" / "events.jsonl").read_text()
    assert "the category loss is off" in write_report(tmp_path / "run").read_text()
    raw = config.model_dump(mode="json")
    raw |= {"task": {"name": "classification"}, "model": raw["model"] | {"num_classes": 5}}
    with pytest.raises(UserError, match=r"no sample of data\.sources has a label") as error:
        run(parse_config(raw), tmp_path / "labels")
    assert error.value.exit_code == 2

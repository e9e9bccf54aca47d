from pathlib import Path

import pytest
import yaml

from data_pipeline.errors import UserError
from pretrain.configuration import dump_config, load_config, parse_config
from pretrain.configuration.schema import RecomputeBudget

MINIMAL = {"data": {"sources": [{"path": "shards"}]}, "schedule": {"steps": 10}}


@pytest.fixture
def minimal(tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return str(path)


def test_overrides_reach_nested_keys_lists_and_scientific_numbers(minimal: str) -> None:
    config = load_config(minimal, ["optimizer.lr=1e-3", "data.sources.0.weight=2.5", "model.overrides={channels: 48}"])
    assert config.optimizer.lr == 1e-3
    assert config.data.sources[0].weight == 2.5
    assert config.model.overrides == {"channels": 48}


def test_the_resolved_whole_reads_back_as_itself(minimal: str) -> None:
    config = load_config(minimal, ["training.zero_stage=3", "deepspeed.zero_optimization.overlap_comm=true"])
    assert parse_config(yaml.safe_load(dump_config(config))) == config


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer.lrr=3", ["optimizer.lrr", "optimizer.lr"]),
        ("trainng.seed=1", ["trainng", "training"]),
        ("batch_size=1", ["batch_size", "training.batch_size"]),
        ("data.sources.0.wieght=2", ["data.sources.0.wieght", "data.sources.0.weight"]),
        ("training.batch_size=-1", ["training.batch_size", "-1"]),
        ("training.zero_stage=4", ["training.zero_stage", "4"]),
        ("training.accumulation=3", ["training.batch_size 256", "training.accumulation 3"]),
        ("schedule.epochs=2", ["schedule.steps", "schedule.epochs"]),
        ("data.sources.7.path=x", ["'7'"]),
        ("optimizer.lr", ["key.path=value"]),
        ("optimizer.lr.x=1", ["optimizer.lr", "valid number"]),
    ],
)
def test_a_wrong_override_names_the_key_and_the_nearest_right_one(
    minimal: str, override: str, words: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        load_config(minimal, [override])
    assert caught.value.exit_code == 2
    for word in words:
        assert word in str(caught.value)


def test_a_missing_file_lists_the_shipped_names() -> None:
    with pytest.raises(UserError, match="neither a file nor a shipped name"):
        load_config("demoo")


def test_broken_yaml_is_refused_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("data: [1,\nschedule: {")
    with pytest.raises(UserError, match="not valid YAML"):
        load_config(str(path))


def test_the_older_key_for_recomputation_is_still_read() -> None:
    for older, now in ((True, "blocks"), (False, "none")):
        assert parse_config({**MINIMAL, "model": {"activation_checkpointing": older}}).model.recompute == now
    budget = parse_config({**MINIMAL, "model": {"recompute": {"budget_gb": 20}}}).model.recompute
    assert isinstance(budget, RecomputeBudget) and budget.budget_gb == 20
    with pytest.raises(UserError, match="activation_checkpointing is now"):
        parse_config({**MINIMAL, "model": {"activation_checkpointing": True, "recompute": "none"}})

"""The study at miniature size: planned once, trained and scored, resumed, and the same again from its plan."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from data_pipeline.errors import UserError
from data_pipeline.format import write_manifest
from data_pipeline.preparation.packing.samples import Sample, pack_shard
from launch.cli import run as command_line
from pretrain.configuration import load_config
from pretrain.studies import study, training
from pretrain.studies.arms import M3I, OPERATOR, arms_of
from pretrain.studies.comparison import paired_bootstrap, summarised, table

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 40), "blue": (30, 40, 220)}
SMALL = (
    "model.overrides.channels=16", "model.overrides.groups=[1, 2, 4, 8]", "model.overrides.depths=[1, 1, 1, 1]",
    "model.overrides.clip_embed_dim=32", "data.image_size=32", "training.batch_size=4",
)  # fmt: skip


def circle(colour: tuple[int, int, int], radius: int) -> bytes:
    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).ellipse((32 - radius, 32 - radius, 32 + radius, 32 + radius), fill=colour)
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def write(folder: Path, radii: tuple[int, ...]) -> None:
    folder.mkdir(parents=True)
    pairs = [(name, radius) for radius in radii for name in COLOURS]
    samples = [
        Sample(
            row=i, image=circle(COLOURS[name], radius), extension="png", format="png", width=64, height=64,
            caption=f"{name}, size {radius}", label=list(COLOURS).index(name),
            fields={"concept": f"{name} {radius}", "kind": "large" if radius > 15 else "small"},
        )
        for i, (name, radius) in enumerate(pairs)
    ]  # fmt: skip
    entry = pack_shard(folder, 0, 0, samples, classes=tuple(COLOURS))
    write_manifest(folder, name=folder.name, shards=[entry], classes=tuple(COLOURS), about={})


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    write(tmp_path / "shards" / "train", (8, 10, 12, 18, 20, 22))
    write(tmp_path / "shards" / "validation", (9, 19))
    write(tmp_path / "shards" / "validation-artist", (11, 21))
    return tmp_path / "shards"


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs without a process each, which would import torch and DeepSpeed every time."""

    monkeypatch.setattr(training, "_launch", lambda command, log: command_line(command))


def test_a_study_is_planned_trained_scored_and_goes_on(shards: Path, tmp_path: Path) -> None:
    arms = ("random", "supervised", "m3i", "staged")
    options = dict(seeds=1, only=arms, shards=shards, seconds=0.05, finetune_steps=2, jobs=1, changes=SMALL)
    first = study("m3i", tmp_path / "a", **options)
    text = first.read_text()
    assert all(f"| {arm} |" in text for arm in arms) and (tmp_path / "a" / "study.png").stat().st_size > 10_000
    kinds = ("category, linear", "kind, nearest 5", "retrieval, caption to picture", "category, fine-tuned")
    assert text.index("# In short") < text.index("# Each score")
    heads = [line for line in text[text.index("# Each score") :].splitlines() if " steps " in line]
    assert [head.split(" | ")[0] for head in heads] == ["| another artist", "| unseen concepts"]
    assert all(kind in head for head in heads for kind in kinds)
    rows = {line.split(" | ")[0]: line for line in text.splitlines()}
    assert rows["| supervised"].count("–") == 2, "no text, no retrieval"
    # Gone on with: only what is missing is made anew, and nothing changes.
    (tmp_path / "a" / "scores" / "m3i-0-validation.json").unlink()
    study("m3i", tmp_path / "a", **options)
    assert first.read_text() == text
    # From scratch by the same plan: the same figures to the last digit.
    (tmp_path / "b").mkdir()
    shutil.copy(tmp_path / "a" / "plan.json", tmp_path / "b" / "plan.json")
    assert study("m3i", tmp_path / "b", **options).read_text() == text
    with pytest.raises(UserError, match="other settings"):
        study("m3i", tmp_path / "a", **{**options, "seconds": 9.0})


def test_a_diverged_arm_is_counted_and_the_others_scored(shards: Path, tmp_path: Path) -> None:
    once = ("training.policy.max_skipped=0", "training.policy.rollbacks=0")
    output, only = tmp_path / "study", ("random", "clip_category")
    options = dict(seeds=1, only=only, shards=shards, seconds=1.0, finetune_steps=0, jobs=1)
    changes = (*SMALL, *once, "optimizer={name: adamw, lr: 1e25}", "training.log_every=1")
    text = study("m3i", output, changes=changes, **options).read_text()
    assert "| clip_category (1 of 1 diverged) |" in text and "| random |" in text
    run = output / "runs" / "clip-category" / "seed-0" / "stage-0"
    assert (run / training.GIVEN_UP).exists()
    assert study("m3i", output, changes=changes, **options).read_text() == text


@pytest.mark.parametrize(("last", "diverged"), [(1.8, False), (2.1, True)])
def test_no_cross_entropy_that_came_down_is_divergence(tmp_path: Path, last: float, diverged: bool) -> None:
    settings = training.Settings("study_m3i", tmp_path, tmp_path, 1.0, 1, 0, 1)
    (arm,) = arms_of("m3i", ("clip",))
    run = training.stage_folder(settings, arm, 0)
    run.mkdir(parents=True)
    rows = [{"loss": 2.0, "loss/text": 2.0}, {"alarm": "x"}, {"loss": 9.0, "loss/text": last}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert training.diverged(settings, arm, 0) == diverged


@pytest.mark.parametrize("arm", [*M3I, *OPERATOR], ids=lambda arm: arm.name)
def test_every_arm_is_a_configuration_that_builds(arm, tmp_path: Path) -> None:
    from pretrain.tasks.task import module_of

    for changes in arm.stages:
        config = load_config("study_m3i", (*SMALL, *changes))
        module = module_of(config, classes=3)
        assert any(parameter.requires_grad for parameter in module.parameters())
        assert config.data.augmentation.caption_dropout == 0.4 and config.data.augmentation.rotate == 15


def test_an_arm_that_there_is_none_of_is_refused() -> None:
    assert [arm.name for arm in arms_of("m3i", ("m3i", "clip"))] == ["clip", "m3i"]
    for study_name, only in (("m4i", ()), ("m3i", ("clap",))):
        with pytest.raises(UserError, match=r"there is m3i|study m3i has random"):
            arms_of(study_name, only)


def test_the_bootstrap_is_paired_and_tells_what_the_data_can_tell() -> None:
    generator = np.random.default_rng(3)
    difficulty = generator.random(200)
    whole = np.stack([(generator.random(200) < difficulty).astype(float) for _ in range(2)])
    better = np.minimum(whole + (generator.random(200) < 0.15), 1.0)
    found = paired_bootstrap(better, whole)
    assert found.told and found.low < found.of < found.high
    assert found.of == pytest.approx((better.mean(0) - whole.mean(0)).mean())
    spread = (better.mean(0) - whole.mean(0)).std() / 200**0.5
    assert found.high - found.low == pytest.approx(2 * 1.96 * spread, rel=0.1)
    same = paired_bootstrap(whole[:1], whole[1:])
    assert not same.told
    text = table({"score": {"a": better, "m3i": whole, "b": whole[:1]}}, ["a", "m3i", "b"], "m3i", {"a": [3, 4]})
    assert "| a | 3 + 4 |" in text and " ≈ |" in text and "**" in text


def test_a_summary_averages_the_ways_to_score_a_picture() -> None:
    hits = {"a": np.array([[1.0, 0.0]]), "m3i": np.array([[0.0, 0.0]])}
    more = {"a": np.array([[0.0, 0.0]]), "m3i": np.array([[1.0, 1.0]])}
    found = summarised({"set: category, linear": hits, "set: category, nearest 5": more, "set: kind, linear": more})
    assert list(found) == ["set: category", "set: kind"]
    assert found["set: category"]["a"].tolist() == [[0.5, 0.0]] and found["set: category"]["m3i"].tolist() == [
        [0.5] * 2
    ]


def test_equal_steps_are_those_of_an_arm_that_is_there(tmp_path: Path) -> None:
    settings = training.Settings("study_m3i", tmp_path, tmp_path, 1.0, 1, 0, 1, SMALL)
    with pytest.raises(UserError, match=r"as many steps as 'm3i': study that one too \(--only 'm3i'\)"):
        training.plan(settings, arms_of("m3i", ("m3i - text, equal steps",)), "m3i")


def test_a_plan_measures_every_stage_and_shares_the_time(shards: Path, tmp_path: Path) -> None:
    settings = training.Settings("study_m3i", shards, tmp_path / "plan", 2.0, 1, 0, 1, SMALL)
    arms = arms_of("m3i", ("m3i", "staged", "m3i - mixing, equal steps", "random"))
    planned = training.plan(settings, arms, "m3i")
    assert planned["random"].steps == (1,)
    assert planned["m3i - mixing, equal steps"].steps == planned["m3i"].steps
    for arm in (planned["m3i"], planned["staged"]):
        spent = sum(cost * steps for cost, steps in zip(arm.step_seconds, arm.steps, strict=True))
        assert 0.6 < spent / 2.0 <= 1.0
    assert len(planned["staged"].steps) == 4
    held = json.loads((tmp_path / "plan" / "plan.json").read_text())
    assert training.plan(settings, arms, "m3i") == planned and held["arms"].keys() == planned.keys()

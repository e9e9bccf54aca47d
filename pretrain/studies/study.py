"""The whole study: plan -> train -> score -> compare. Every part sees what is there, so a stopped study goes on.

OUTPUT/shards/                the embedded set, where no other is given
OUTPUT/plan.json  runs/       training.py
OUTPUT/scores/ARM-SEED.json   hits, picture by picture
OUTPUT/study.md  study.png    the table and the plot
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from data_pipeline.durable import write_durably
from pretrain.studies.arms import WHOLE_ARMS, Arm, arms_of
from pretrain.studies.comparison import plot, summarised, table
from pretrain.studies.features import Hits, classified, frozen_scores
from pretrain.studies.training import Settings, diverged, finetune_folder, plan, stage_folder, train

QUICK_SECONDS, FULL_SECONDS = 110.0, 400.0  # CPU time of the training of one arm
QUICK_FINETUNE, FULL_FINETUNE = 0, 150  # steps
DRAWINGS_A_CONCEPT = 3
SETS = {"another artist": "{}-artist", "unseen concepts": "{}"}


def study(
    name: str,
    output: Path,
    *,
    quick: bool = False,
    seeds: int = 2,
    only: Sequence[str] = (),
    held_out: bool = False,
    shards: Path | None = None,
    seconds: float | None = None,
    finetune_steps: int | None = None,
    jobs: int = 2,
    changes: Sequence[str] = (),
    say: Callable[[str], None] = print,
) -> Path:
    """Run study `name` into `output`, or go on with it; the table's path.

    held_out: score on the held-out sets, which is done once; by default on validation. only: some of the arms. changes:
    of the configuration, for all arms. Raises UserError for unknown arms, and where a run failed.
    """
    arms, whole = arms_of(name, tuple(only)), WHOLE_ARMS[name]
    output = Path(output)
    if shards is None:
        from data_pipeline.preparation.sources.openmoji import build_openmoji

        shards = output / "shards"
        build_openmoji(shards, drawings_a_concept=DRAWINGS_A_CONCEPT)
    settings = Settings(
        "study_m3i",
        shards,
        output,
        seconds if seconds is not None else QUICK_SECONDS if quick else FULL_SECONDS,
        seeds,
        finetune_steps if finetune_steps is not None else QUICK_FINETUNE if quick else FULL_FINETUNE,
        jobs,
        tuple(changes),
    )
    planned = plan(settings, arms, whole)
    for arm in arms:
        costs = ", ".join(f"{1000 * cost:.0f} ms" for cost in planned[arm.name].step_seconds)
        say(f"{arm.name}: {' + '.join(map(str, planned[arm.name].steps))} steps of {costs}")
    train(settings, arms, planned)
    split = "held-out" if held_out else "validation"
    tests = {title: shards / pattern.format(split) for title, pattern in SETS.items()}
    lost = {arm.name: [seed for seed in range(settings.seeds) if diverged(settings, arm, seed)] for arm in arms}
    scored = {
        (arm.name, seed): _scores(settings, arm, seed, tests, split)
        for arm in arms
        for seed in range(settings.seeds)
        if seed not in lost[arm.name]
    }
    hits: dict[str, dict[str, list[list[float]]]] = {}
    for (named, _), found in scored.items():
        for title, own in found.items():
            for what, values in own.items():
                hits.setdefault(f"{title}: {what}", {}).setdefault(named, []).append(values)
    arrays = {score: {arm: np.array(rows) for arm, rows in by_arm.items()} for score, by_arm in hits.items()}
    names = [arm.name for arm in arms]
    steps = {arm.name: planned[arm.name].steps for arm in arms}
    path = output / "study.md"
    shares = {name: f"{len(seeds_lost)} of {settings.seeds}" for name, seeds_lost in lost.items() if seeds_lost}
    short, each = (table(one, names, whole, steps, shares) for one in (summarised(arrays), arrays))
    text = f"# In short: hits averaged over the ways to score them\n\n{short}\n# Each score\n\n{each}"
    write_durably(path, text)
    plot(arrays, names, whole, output / "study.png")
    say(f"{path}, {output / 'study.png'}" if whole in names and len(lost[whole]) < settings.seeds else str(path))
    return path


def _scores(settings: Settings, arm: Arm, seed: int, tests: dict[str, Path], split: str) -> dict[str, Hits]:
    path = settings.output / "scores" / f"{arm.slug}-{seed}-{split}.json"
    if path.exists():
        held: dict[str, Hits] = json.loads(path.read_text(encoding="utf-8"))
        return held
    found = frozen_scores(stage_folder(settings, arm, seed), settings.shards / "train", tests)
    if settings.finetune_steps:
        for title, own in classified(finetune_folder(settings, arm, seed), tests).items():
            found[title] |= own
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, json.dumps(found) + "\n")
    return found

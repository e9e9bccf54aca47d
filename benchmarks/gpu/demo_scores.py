"""The demo's pretraining, whole, on one GPU, and its scores on the held-out concepts.

    python benchmarks/gpu/demo_scores.py --shards FOLDER [--seconds 60]

FOLDER holds the embedded set (train, validation, held-out), which this machine cannot draw; made elsewhere by

    python benchmarks/gpu/demo_scores.py --make FOLDER            (13 MB; needs the extra `demo`)

configs/demo.yaml through pretrain.training in this process, with reading processes and one rank, then retrieval and
zero-shot classification by pretrain.evaluation, as the demo makes them, beside chance and the untrained model. Thirty
steps beforehand tell how many fit into --seconds; where that is less than the recipe's, its schedule is shortened to
as many, and the row says so.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from needs import packages
from record import headline, not_here, record, small

STEP = "demo"
CONFIG = "demo"
TRIAL_STEPS = 30
RESERVE = 0.9  # of the seconds: logging, the last save


def train(shards: Path, output: Path, *changes: str) -> dict[str, float]:
    """Train into `output`; the last row of metrics.jsonl."""
    from pretrain.configuration import load_config
    from pretrain.training import run

    # Workers as many as the machine has cores for, up to what a batch of 64 small pictures can feed.
    workers = 0 if small() else min(8, max(1, (os.cpu_count() or 1) - 2))
    settings = (f"data.sources.0.path={shards / 'train'}", f"data.workers={workers}", *changes)
    code = run(load_config(CONFIG, settings), output)
    if code != 0:
        raise RuntimeError(f"training ended with exit code {code}")
    rows: list[dict[str, float]] = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return rows[-1]


def scores(output: Path, shards: Path) -> list[dict[str, Any]]:
    """A row a score: of how many, trained, untrained, chance."""
    from pretrain.evaluation import evaluate

    found = evaluate(output, shards / "held-out", tasks=("retrieval", "zero-shot"))
    return [
        {
            "task": name,
            **{key: value for key, value in score.items() if key in ("name", "value", "chance", "count", "beside")},
        }
        for name, result in found.items()
        for score in result["scores"]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path)
    parser.add_argument("--make", type=Path, help="draw the set into this folder, and do nothing else")
    parser.add_argument("--seconds", type=float, default=60.0, help="for the pretraining")
    parser.add_argument("--small", action="store_true", help="six steps")
    options = parser.parse_args()
    if options.make is not None:
        from data_pipeline.preparation.sources.openmoji import build_openmoji
        from pretrain.demo.walk import DRAWINGS_A_CONCEPT

        build_openmoji(options.make, drawings_a_concept=DRAWINGS_A_CONCEPT)
        size = sum(path.stat().st_size for path in options.make.rglob("*") if path.is_file())
        print(f"{options.make}: {size / 1e6:.1f} MB")
        return
    if options.shards is None or not (options.shards / "train" / "manifest.json").is_file():
        not_here(STEP, "no shards of the embedded set: --shards")
    with packages(STEP), tempfile.TemporaryDirectory() as folder:
        from pretrain.configuration import load_config

        shards, output = options.shards, Path(folder) / "run"
        whole = load_config(CONFIG).schedule.steps or 0
        trial = 4 if small() else TRIAL_STEPS
        short = (f"schedule.steps={trial}", "schedule.warmup_steps=1", "checkpoint.every_steps=null")
        fewer = ("training.batch_size=8",) if small() else ()
        row = train(shards, Path(folder) / "trial", *short, *fewer, f"training.log_every={max(1, trial // 3)}")
        fit = int(RESERVE * 1e3 * options.seconds / row["step_ms"])
        steps = 6 if small() else min(whole, fit)
        about: dict[str, Any] = {
            "steps": steps,
            "recipe_steps": whole,
            "device": "cuda" if torch.cuda.is_available() else "cpu",
        }
        record(STEP, about | {"trial_step_ms": row["step_ms"], "trial_data_wait_ms": row["data_wait_ms"]})
        changes = [f"schedule.steps={steps}"]
        if steps <= 60:
            changes.append("schedule.warmup_steps=1")
        if small():
            changes += [*fewer, "training.log_every=2", "checkpoint.every_steps=null"]
        started = time.perf_counter()
        row = train(shards, output, *changes)
        kept = ("loss", "step_ms", "data_wait_ms", "images_per_second", "memory_mb", "tflops_per_rank")
        about |= {"training_s": round(time.perf_counter() - started, 1)}
        record(STEP, about | {key: row[key] for key in kept if key in row})
        length = f"{steps} of {whole} steps in {about['training_s']} s"
        headline(STEP, length)
        found = scores(output, shards)
        for one in found:
            record(STEP, one)
        told = [f"{one['name']} {one['value']:.3f} (chance {one['chance']:.3f})" for one in found]
        headline(STEP, f"{length}: " + ", ".join(told))


if __name__ == "__main__":
    main()

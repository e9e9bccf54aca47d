"""The walk: seven stages, each a command that anybody would type, on drawings that pip has brought.

    OUTPUT/shards/                               two artists' drawings, split by concept and by artist
    OUTPUT/                                      the pretraining run: checkpoints, metrics.jsonl, report.html, ...
    OUTPUT/export/backbone.safetensors           the image encoder alone
    OUTPUT/finetune/  OUTPUT/scratch/            the same fine-tuning from it and from random weights
    OUTPUT/evaluation/*.json                     scores on what was held out: unseen concepts, another artist

Run again, it goes on where it was: every stage sees what is there.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_pipeline.errors import STOPPED
from pretrain.configuration import load_config
from pretrain.demo import commands
from pretrain.demo.commands import Job

PRETRAINING, FINETUNING = "demo", "demo_finetune"
DRAWINGS_A_CONCEPT = 3  # people come in dozens, told apart by skin tone: with all of them little else is learned
# What is withheld, in words, and what the names of its results begin with.
HELD_OUT = {"held-out-artist": ("another artist", "artist"), "held-out": ("unseen concepts", "unseen")}
SEGMENT_STEPS, PATIENCE, LEAST_STEPS = 50, 4, 250


def walk(output: Path, overrides: tuple[str, ...] = ()) -> int:
    """Walk the whole way into `output`; the exit code.

    Raises UserError naming the stage that failed. `overrides` shorten the pretraining (`schedule.steps=20`), for tests.
    """
    began = time.monotonic()
    output = Path(output)
    shards = output / "shards"
    with _stage(1, "Shards from OpenMoji and Twemoji drawings"):
        _prepare(shards)
    with _stage(2, "Pretraining, stopped by SIGTERM in the middle"):
        pretraining = _pretraining(output, shards, overrides)
        steps = load_config(PRETRAINING, overrides).schedule.steps or 0
        if not (output / "checkpoints").exists():
            commands.check(commands.run_and_stop(pretraining, output, steps // 2), "pretraining", STOPPED)
    with _stage(3, "Pretraining, resumed by the same command"):
        commands.check(commands.run_and_stop(pretraining, output, steps + 1), "pretraining")
    with _stage(4, "Export of the image encoder"):
        from pretrain.handoff import export

        backbone = export(output, "safetensors", output / "export" / "backbone.safetensors")
        print(f"{backbone} ({backbone.stat().st_size / 1e6:.1f} MB)")
    with _stage(5, "Fine-tuning from the export, and the same from random weights, each until validation stops rising"):
        jobs = [_finetuning(output, shards, "finetune", backbone), _finetuning(output, shards, "scratch", None)]
        for job, code in zip(jobs, commands.run_side_by_side(jobs, threads=_threads(len(jobs))), strict=True):
            commands.check(code, f"{job.title} ({job.run / 'output.log'})")
    with _stage(6, "Scores on held-out drawings"):
        results = _score(output, shards)
    with _stage(7, "Report"):
        from pretrain.report import write_report

        report = write_report(output)
    _table(results, report, time.monotonic() - began)
    return commands.DONE


@contextmanager
def _stage(number: int, title: str) -> Iterator[None]:
    print(f"\n[{number}/7] {title}", flush=True)
    began = time.monotonic()
    yield
    print(f"      {time.monotonic() - began:.0f} s", flush=True)


def _prepare(shards: Path) -> None:
    from rich.console import Console
    from rich.progress import Progress

    from data_pipeline.format import read_manifest
    from data_pipeline.preparation.sources import openmoji

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as bars:
        bar = bars.add_task("drawings", total=None)
        folders = openmoji.build_openmoji(
            shards,
            drawings_a_concept=DRAWINGS_A_CONCEPT,
            progress=lambda done, total: bars.update(bar, completed=done, total=total),
        )
    for name, folder in folders.items():
        found = read_manifest(folder)
        print(f"{name}: {found.samples} drawings in {len(found.shards)} shards, {folder}")


def _pretraining(output: Path, shards: Path, overrides: tuple[str, ...]) -> list[str]:
    import torch

    batch = load_config(PRETRAINING, overrides).training.batch_size
    processes = ranks_for(torch.cuda.device_count() or 2, batch)
    train = f"data.sources.0.path={shards / 'train'}"
    return ["pretrain", PRETRAINING, train, *overrides, "--output", str(output), "--processes", str(processes)]


def ranks_for(devices: int, batch: int) -> int:
    """The most ranks up to `devices` that share `batch` in equal parts of whole pairs, as the mixing needs."""
    return next(n for n in range(devices, 0, -1) if batch % (2 * n) == 0)


def _finetuning(output: Path, shards: Path, name: str, source: Path | None) -> Job:
    run = output / name
    arguments = ["finetune", FINETUNING, f"data.sources.0.path={shards / 'train'}", "--output", str(run)]
    arguments += ["--validation", str(shards / "validation"), "--processes", "1"]
    arguments += ["--segment-steps", str(SEGMENT_STEPS), "--patience", str(PATIENCE), "--least-steps", str(LEAST_STEPS)]
    # The pretraining has named these categories already: its classifier goes on where random weights have a new one.
    arguments += ["--from", str(source), "--head-rows", "names"] if source else []
    title = "pretrained" if source else "random weights"
    return Job(title, tuple(arguments), run, load_config(FINETUNING).schedule.steps or 0)


def _threads(jobs: int) -> int:
    import os

    return max(1, (os.cpu_count() or 1) // jobs)


def _score(output: Path, shards: Path) -> dict[str, list[dict[str, Any]]]:
    """The results by what was held out."""
    from pretrain.evaluation import evaluate, put_beside, write_result

    found = {}
    for name, (title, label) in HELD_OUT.items():
        held_out = shards / name
        scores = evaluate(output, held_out, tasks=("retrieval", "zero-shot"), label=label, say=print)
        top1 = {
            run: evaluate(output / run, held_out, tasks=("top1",), choice="best", untrained=False, say=print)["top1"]
            for run in ("finetune", "scratch")
        }
        tuned = put_beside(top1["finetune"], "random weights", top1["scratch"])
        write_result(output, f"{label}-fine-tuned-top1", tuned)
        found[title] = [*scores.values(), tuned]
    return found


def _table(results: dict[str, list[dict[str, Any]]], report: Path, seconds: float) -> None:
    from rich.console import Console
    from rich.table import Table

    from pretrain.evaluation import summary

    console = Console(width=None if sys.stdout.isatty() else 150)
    for title, found in results.items():
        table = Table(title, "score", "chance", "beside", title=None)
        for row in summary(found):
            table.add_row(*row)
        console.print()
        console.print(table)
    console.print(f"{report} (open it in a browser); {seconds / 60:.1f} minutes in all", soft_wrap=True)

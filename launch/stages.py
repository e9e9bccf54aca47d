"""Several trainings from one command: a chain, each from the one before, or a sweep over values of keys. Pure.

--chain a.yaml,b.yaml,evaluate:SET      pretrain a  ->  finetune b --from runs/a  ->  evaluate runs/b --data SET
--sweep optimizer.lr=1e-4,3e-4          one run a value, each in a folder of its own
"""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

from data_pipeline.errors import UserError
from launch.invocation import default_output, run_directory

_EVALUATE = "evaluate:"
_PRETRAINING = "pretraining"


def chain(
    parts: Sequence[str], overrides: Sequence[str], folder: Path | None, task_of: Callable[[str], str]
) -> list[list[str]]:
    """The commands of a chain, in order. folder: where the runs are made, each by its configuration's name; runs/ by
    default. task_of: the name of a configuration's task.
    """
    commands: list[list[str]] = []
    before: Path | None = None
    for part in parts:
        if part.startswith(_EVALUATE):
            if before is None:
                raise UserError(f"--chain {part}: an evaluation stands after the training that it scores")
            commands.append(["evaluate", str(before), "--data", part.removeprefix(_EVALUATE)])
            continue
        run = default_output(part) if folder is None else folder / Path(part).stem
        tuning = task_of(part) != _PRETRAINING
        source = ["--from", str(before)] if before is not None and tuning else []
        start = [f"initialize_from={before}"] if before is not None and not tuning else []
        commands.append(["finetune" if tuning else "pretrain", part, *overrides, *start, *source, "--output", str(run)])
        before = run
    if len(commands) < 2:
        raise UserError("--chain: name two stages or more, as pretrain.yaml,finetune.yaml,evaluate:shards/val")
    return commands


def sweep(command: Sequence[str], sweeps: Sequence[str]) -> list[list[str]]:
    """One command for each combination of values, with a run directory of its own."""
    run = run_directory(command)
    if run is None:
        raise UserError(
            "--sweep goes with a training, as in: launch slurm --sweep optimizer.lr=1e-4,3e-4 pretrain CONFIG"
        )
    choices = []
    for text in sweeps:
        key, equals, values = text.partition("=")
        if not equals or not key or not all(values.split(",")):
            raise UserError(f"--sweep {text!r}: expected KEY=VALUE,VALUE,...")
        choices.append([(key, value) for value in values.split(",")])
    words = _without_output(command)
    return [
        [*words, *(f"{key}={value}" for key, value in pairs), "--output", f"{run}-{_name(pairs)}"]
        for pairs in itertools.product(*choices)
    ]


def _name(pairs: Sequence[tuple[str, str]]) -> str:
    return "-".join(f"{key.rpartition('.')[2]}={value}" for key, value in pairs)


def _without_output(command: Sequence[str]) -> list[str]:
    kept, skip = [], False
    for word in command:
        if skip or word in ("--output", "-o"):
            skip = not skip
        elif not word.startswith("--output="):
            kept.append(word)
    return kept

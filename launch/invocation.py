"""How this very command is started again: by the launcher for its ranks, and in scripts for other machines."""

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

_OPTIONS_WITH_A_VALUE = frozenset(
    (
        "--output",
        "-o",
        "--from",
        "--processes",
        "--profile",
        "--allow-change",
        "--head-rows",
        "--validation",
        "--segment-steps",
        "--patience",
        "--least-steps",
    )
)


def inside_a_launcher() -> bool:
    """True in a rank: our launcher, torchrun, deepspeed or our Slurm script have set RANK."""
    return "RANK" in os.environ


def own_command(arguments: Sequence[str]) -> list[str]:
    """`internimage ARGUMENTS` by this interpreter, which also works from a source tree."""
    return [sys.executable, "-m", "launch", *arguments]


def resolve_command(command: Sequence[str], portable: bool = False) -> list[str]:
    """A user's COMMAND as an argument vector: `internimage ...`, or a subcommand alone, is run by this interpreter.

    `portable` keeps the plain word `internimage`, for a container where this interpreter does not exist.
    """
    words = list(command)
    subcommands = ("pretrain", "finetune", "evaluate", "embed", "demo", "doctor")
    if words and words[0] in subcommands and shutil.which(words[0]) is None:
        words = ["internimage", *words]
    if words and Path(words[0]).name == "internimage" and not portable:
        return own_command(words[1:])
    return words


def run_directory(command: Sequence[str]) -> Path | None:
    """Where a `pretrain` or `finetune` COMMAND will write: its --output, or the default. None for other commands."""
    arguments = _training_arguments(command)
    if arguments is None:
        return None
    for position, word in enumerate(arguments):
        if word in ("--output", "-o") and position + 1 < len(arguments):
            return Path(arguments[position + 1])
        if word.startswith("--output="):
            return Path(word.partition("=")[2])
    given = configuration_of(command)
    return default_output(given[0]) if given else None


def configuration_of(command: Sequence[str]) -> tuple[str, list[str]] | None:
    """CONFIG and its overrides in a `pretrain CONFIG ...` COMMAND; None for other commands."""
    arguments = _training_arguments(command)
    if arguments is None:
        return None
    positional, skip = [], False
    for word in arguments:
        if skip or word.startswith("-"):
            skip = not skip and word in _OPTIONS_WITH_A_VALUE
        else:
            positional.append(word)
    return (positional[0], positional[1:]) if positional else None


def searches_for_a_plateau(command: Sequence[str]) -> bool:
    """Whether a `finetune CONFIG ...` COMMAND has --validation, which starts its own ranks."""
    arguments = _training_arguments(command) or []
    return any(word == "--validation" or word.startswith("--validation=") for word in arguments)


def _training_arguments(command: Sequence[str]) -> list[str] | None:
    """What follows `[internimage] pretrain`, or `python -m launch pretrain`."""
    words = list(command)
    for name in ("pretrain", "finetune"):
        for head in ([name], ["internimage", name], ["-m", "launch", name]):
            at = 1 if head[0] == "-m" else 0
            start = words[at : at + len(head)]
            if start and [Path(start[0]).name, *start[1:]] == head:
                return words[at + len(head) :]
    return None


def default_output(config: str) -> Path:
    """`runs/NAME` for the configuration NAME.yaml: the same command finds the same directory, and so resumes."""
    return Path("runs") / Path(config).stem

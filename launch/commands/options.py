"""Arguments and options that several commands have."""

from collections.abc import Collection
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Which(StrEnum):
    ema = "ema"
    model = "model"


Json = Annotated[bool, typer.Option("--json", help="For machines.")]
CheckpointPath = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT", help="A run directory, or one of its checkpoints.")
]
CheckpointChoice = Annotated[
    str, typer.Option("--checkpoint", help="Of a run: best, latest, a step; auto is the best where there is one.")
]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
Weights = Annotated[Which, typer.Option(help="The EMA weights or the trained ones.")]
Config = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, or the bare name of a shipped one.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, as optimizer.lr=1e-3.", show_default=False),
]
RunOutput = Annotated[
    Path | None, typer.Option("--output", "-o", help="Run directory, started or resumed. [default: runs/CONFIG]")
]
Processes = Annotated[str, typer.Option(help="Ranks on this machine: a number, or auto = every GPU, 1 on a CPU.")]
PrintConfig = Annotated[bool, typer.Option("--print-config", help="Show the resolved configuration and stop.")]
AllowChange = Annotated[
    list[str] | None,
    typer.Option("--allow-change", metavar="KEY", help="Resume with another value of this key. Repeatable."),
]


def with_allowed_changes(overrides: list[str] | None, allowed: list[str] | None) -> list[str] | None:
    """`--allow-change` as the override that carries it to every rank."""
    if not allowed:
        return overrides
    import json

    return [*(overrides or []), f"training.allow_changes={json.dumps(allowed)}"]


def refuse_other_options(context: typer.Context, taken: Collection[str], beside: str) -> None:
    """Raises UserError for options of this command line that have no effect beside another one.

    taken: parameters that have one, by their names in Python.
    """
    from data_pipeline.errors import UserError

    given = [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.name is not None and parameter.name not in taken
        if (source := context.get_parameter_source(parameter.name)) is not None and source.name == "COMMANDLINE"
    ]
    if given:
        raise UserError(f"{', '.join(given)}: no effect beside {beside}; leave it out")

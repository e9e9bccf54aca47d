"""`internimage pretrain`: start or resume a run."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from data_pipeline.errors import DONE
from launch.commands.options import (
    AllowChange,
    Config,
    Overrides,
    PrintConfig,
    Processes,
    RunOutput,
    with_allowed_changes,
)

if TYPE_CHECKING:
    from pretrain.training.safeguards.interruption import Interruption

EXAMPLE = "internimage pretrain internimage_h_m3i_427m --output runs/h training.zero_stage=2"


def pretrain(
    config: Config,
    overrides: Overrides = None,
    output: RunOutput = None,
    processes: Processes = "auto",
    profile: Annotated[
        str | None,
        typer.Option(metavar="FIRST:LAST", help="Trace these steps of every rank for Chrome, as 10:13 or steps=10:13."),
    ] = None,
    allow_change: AllowChange = None,
    print_config: PrintConfig = False,
) -> int:
    """Pretrain from CONFIG; the same command resumes."""
    from launch.invocation import default_output
    from launch.starting import start_ranks
    from pretrain.configuration import dump_config, load_config

    if profile is not None:
        overrides = [*(overrides or []), f"training.profile={json.dumps(profile.removeprefix('steps='))}"]
    overrides = with_allowed_changes(overrides, allow_change)
    resolved = load_config(config, overrides or ())
    if print_config:
        typer.echo(dump_config(resolved), nl=False)
        return DONE
    folder = output or default_output(config)

    def rank(interruption: "Interruption") -> int:
        from pretrain.training import run

        return run(resolved, folder, interruption=interruption)

    words = ["pretrain", config, *(overrides or []), "--output", str(folder)]
    return start_ranks(resolved, folder, processes, words, rank)

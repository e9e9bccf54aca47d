"""`internimage finetune`: start or resume a fine-tuning, for a given length or until validation stops rising."""

from pathlib import Path
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

EXAMPLE = "internimage finetune finetune_in1k --from runs/h model.name=internimage_h --output runs/h-in1k"


def finetune(
    config: Config,
    overrides: Overrides = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            "--from", help="Run, checkpoint or weights file (.safetensors, .pth) to start from; none: random."
        ),
    ] = None,
    head_rows: Annotated[
        str | None,
        typer.Option(help="Rows of the source's classifier to start from: names, or a file of rows or of names."),
    ] = None,
    validation: Annotated[
        Path | None,
        typer.Option(help="Validation set: train at a constant lr until its score stops rising, keep the best."),
    ] = None,
    segment_steps: Annotated[int, typer.Option(min=1, help="With --validation: steps between its scores.")] = 1000,
    patience: Annotated[int, typer.Option(min=1, help="With --validation: scores without a gain that end it.")] = 3,
    least_steps: Annotated[int, typer.Option(min=0, help="With --validation: no end before this step.")] = 0,
    output: RunOutput = None,
    processes: Processes = "auto",
    allow_change: AllowChange = None,
    print_config: PrintConfig = False,
) -> int:
    """Fine-tune a pretrained backbone with labels; the same command resumes."""
    from data_pipeline.errors import UserError
    from launch.invocation import default_output
    from launch.starting import start_ranks
    from pretrain.configuration import dump_config, load_config

    overrides = with_allowed_changes(overrides, allow_change)
    resolved = load_config(config, overrides or ())
    if print_config:
        typer.echo(dump_config(resolved), nl=False)
        return DONE
    if checkpoint is not None and not checkpoint.exists():
        raise UserError(f"--from {checkpoint}: does not exist; give a run directory, a checkpoint or a weights file")
    folder = output or default_output(config)
    if validation is not None:
        from launch.plateau import Search, finetune_to_plateau

        search = Search(validation, segment_steps, patience, least_steps)
        return finetune_to_plateau(resolved, checkpoint, folder, processes, search, head_rows)

    def rank(interruption: "Interruption") -> int:
        from pretrain import finetuning

        return finetuning.finetune(
            resolved, source=checkpoint, head_rows=head_rows, output=folder, interruption=interruption
        )

    source = ["--from", str(checkpoint)] if checkpoint else []
    rows = ["--head-rows", head_rows] if head_rows else []
    words = ["finetune", config, *(overrides or []), *source, *rows, "--output", str(folder)]
    return start_ranks(resolved, folder, processes, words, rank)

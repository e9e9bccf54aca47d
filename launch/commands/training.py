"""`internimage pretrain` and `internimage finetune`: start or resume, alone or as all ranks of this machine."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data_pipeline.errors import DONE

if TYPE_CHECKING:
    from pretrain.configuration import RunConfig

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, or the bare name of a shipped one.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, as optimizer.lr=1e-3.", show_default=False),
]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="Run directory, started or resumed. [default: runs/CONFIG]")
]
Processes = Annotated[str, typer.Option(help="Ranks on this machine: a number, or auto = every GPU, 1 on a CPU.")]
PrintConfig = Annotated[bool, typer.Option("--print-config", help="Show the resolved configuration and stop.")]


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: internimage pretrain internimage_h_m3i_427m --output runs/h training.zero_stage=2")(
        pretrain
    )
    app.command(epilog="Example: internimage finetune finetune_in1k --from runs/h --output runs/h-in1k")(finetune)


def pretrain(
    config: Config,
    overrides: Overrides = None,
    output: Output = None,
    processes: Processes = "auto",
    profile: Annotated[
        str | None,
        typer.Option(metavar="FIRST:LAST", help="Trace these steps of every rank for Chrome, as 10:13 or steps=10:13."),
    ] = None,
    print_config: PrintConfig = False,
) -> int:
    """Pretrain from CONFIG; the same command resumes."""
    if profile is not None:
        overrides = [*(overrides or []), f"training.profile={json.dumps(profile.removeprefix('steps='))}"]
    resolved = _load(config, overrides)
    if print_config:
        return _show(resolved)
    from launch.invocation import default_output

    folder = output or default_output(config)
    arguments = ["pretrain", config, *(overrides or []), "--output", str(folder)]
    return _run(resolved, folder, processes, arguments, lambda: _pretrain_rank(resolved, folder))


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
        Path | None, typer.Option(help="Text file: for each class, the row of the source's classifier to start from.")
    ] = None,
    validation: Annotated[
        Path | None,
        typer.Option(help="Validation set: train at a constant rate until its top-1 stops rising, keep the best."),
    ] = None,
    segment_steps: Annotated[int, typer.Option(min=1, help="With --validation: steps between its scores.")] = 1000,
    patience: Annotated[int, typer.Option(min=1, help="With --validation: scores without a gain that end it.")] = 3,
    least_steps: Annotated[int, typer.Option(min=0, help="With --validation: no end before this step.")] = 0,
    output: Output = None,
    processes: Processes = "auto",
    print_config: PrintConfig = False,
) -> int:
    """Fine-tune a pretrained backbone with labels; the same command resumes."""
    resolved = _load(config, overrides)
    if print_config:
        return _show(resolved)
    from data_pipeline.errors import UserError
    from launch.invocation import default_output

    if checkpoint is not None and not checkpoint.exists():
        raise UserError(f"--from {checkpoint}: does not exist; give a run directory, a checkpoint or a weights file")
    folder = output or default_output(config)
    if validation is not None:
        if head_rows is not None:
            raise UserError("--head-rows does not go with --validation; take the rows in a run without it")
        from launch.commands.plateau import finetune_to_plateau

        return finetune_to_plateau(
            resolved,
            source=checkpoint,
            output=folder,
            validation=validation,
            segment_steps=segment_steps,
            patience=patience,
            least_steps=least_steps,
            processes=processes,
        )
    source = ["--from", str(checkpoint)] if checkpoint else []
    rows = ["--head-rows", str(head_rows)] if head_rows else []
    arguments = ["finetune", config, *(overrides or []), *source, *rows, "--output", str(folder)]
    return _run(resolved, folder, processes, arguments, lambda: _finetune_rank(resolved, checkpoint, head_rows, folder))


def _load(config: str, overrides: list[str] | None) -> "RunConfig":
    from pretrain.configuration import load_config

    return load_config(config, overrides or ())


def _show(config: "RunConfig") -> int:
    from pretrain.configuration import dump_config

    typer.echo(dump_config(config), nl=False)
    return DONE


def _run(config: "RunConfig", output: Path, processes: str, arguments: list[str], one_rank: Callable[[], int]) -> int:
    """Be one rank inside a launcher; otherwise check what can be checked and start the ranks of this machine."""
    from launch import invocation, local, machine, preflight
    from launch.supervision import Patience

    if invocation.inside_a_launcher():
        preflight.check_run(config, int(os.environ.get("WORLD_SIZE", "1")))
        return _be_a_rank(one_rank)
    count = machine.resolve_processes(processes)
    preflight.check_run(config, count)
    preflight.check_output(output)
    if count == 1:
        return _be_a_rank(one_rank)
    patience = Patience.with_grace(config.training.policy.grace_seconds)
    return local.spawn(
        invocation.own_command(arguments), count, logs=output / "logs", patience=patience, hold_signals=True
    )


def _be_a_rank(one_rank: Callable[[], int]) -> int:
    """Importing torch takes seconds, and a request to stop may come meanwhile: keep it for the run to find."""
    from launch.ranks import release_signals
    from pretrain.training.interruption import Interruption

    early = Interruption().install()
    release_signals()
    try:
        return one_rank()
    finally:
        early.remove()


def _pretrain_rank(config: "RunConfig", output: Path) -> int:
    from pretrain.training import run

    return run(config, output)


def _finetune_rank(config: "RunConfig", source: Path | None, head_rows: Path | None, output: Path) -> int:
    from pretrain.finetuning import finetune as work

    return work(config, source=source, head_rows=head_rows, output=output)

"""`internimage finetune --validation SET`: train until the validation split stops improving."""

from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.errors import DONE

if TYPE_CHECKING:
    from pretrain.configuration import RunConfig

SEGMENT = "segment.yaml"


def finetune_to_plateau(
    config: "RunConfig",
    *,
    source: Path | None,
    output: Path,
    validation: Path,
    segment_steps: int,
    patience: int,
    least_steps: int,
    processes: str,
) -> int:
    """Segments of a run, each scored on `validation` by this process, no rank itself where there are several."""
    from data_pipeline.errors import UserError
    from launch import invocation, local, machine, preflight
    from launch.supervision import Patience

    if invocation.inside_a_launcher():
        raise UserError("--validation starts its own ranks: run it on one machine, not under a launcher (RANK is set)")
    count = machine.resolve_processes(processes)
    preflight.check_run(config, count)
    preflight.check_output(output)
    from pretrain.finetuning import train_to_plateau

    def spawned(segment: "RunConfig", start: Path | None, run: Path) -> int:
        from pretrain.configuration import dump_config

        run.mkdir(parents=True, exist_ok=True)
        (run / SEGMENT).write_text(dump_config(segment), encoding="utf-8")
        arguments = ["finetune", str(run / SEGMENT), "--output", str(run)]
        arguments += ["--from", str(start)] if start is not None else []
        patience = Patience.with_grace(config.training.policy.grace_seconds)
        return local.spawn(
            invocation.own_command(arguments), count, logs=run / "logs", patience=patience, hold_signals=True
        )

    plateau = train_to_plateau(
        config,
        source=source,
        output=output,
        validation=validation,
        segment_steps=segment_steps,
        patience=patience,
        least_steps=least_steps,
        train=spawned if count > 1 else None,
    )
    ended = "its plateau" if plateau.reached else "the longest length allowed"
    print(f"validation top-1 {plateau.validation:.3f} at step {plateau.step}, trained to {ended}: {plateau.checkpoint}")
    return DONE

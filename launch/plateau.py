"""`internimage finetune --validation SET`: train until the validation split stops improving."""

from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import DONE, UserError
from launch import invocation, local, machine, preflight
from launch.supervision import Patience
from pretrain.configuration import RunConfig, dump_config

SEGMENT = "segment.yaml"


@dataclass(frozen=True)
class Search:
    """How the plateau is looked for: a score on `validation` every `segment_steps`; `patience` scores without a gain,
    from `least_steps` on, end the training.
    """

    validation: Path
    segment_steps: int
    patience: int
    least_steps: int


def finetune_to_plateau(
    config: RunConfig, source: Path | None, output: Path, processes: str, search: Search, head_rows: str | None = None
) -> int:
    """Segments of a run, each scored on `validation` by this process, no rank itself where there are several."""
    if invocation.inside_a_launcher():
        raise UserError("--validation starts its own ranks: run it on one machine, not under a launcher (RANK is set)")
    count = machine.resolve_processes(processes)
    preflight.check_run(config, count)
    preflight.check_output(output)
    from pretrain.finetuning import train_to_plateau

    def spawned(segment: RunConfig, start: Path | None, run: Path) -> int:
        run.mkdir(parents=True, exist_ok=True)
        (run / SEGMENT).write_text(dump_config(segment), encoding="utf-8")
        words = ["finetune", str(run / SEGMENT), "--output", str(run)]
        words += ["--from", str(start)] if start is not None else []
        words += ["--head-rows", head_rows] if head_rows is not None else []
        patience = Patience.with_grace(config.training.policy.grace_seconds)
        return local.spawn(
            invocation.own_command(words), count, logs=run / "logs", patience=patience, hold_signals=True
        )

    plateau = train_to_plateau(
        config,
        source=source,
        output=output,
        validation=search.validation,
        segment_steps=search.segment_steps,
        patience=search.patience,
        least_steps=search.least_steps,
        head_rows=head_rows,
        train=spawned if count > 1 else None,
    )
    ended = "its plateau" if plateau.reached else "the longest length allowed"
    score = f"validation score {plateau.validation:.3f} at step {plateau.step}"
    print(f"{score}, trained to {ended}: {plateau.checkpoint}")
    return DONE

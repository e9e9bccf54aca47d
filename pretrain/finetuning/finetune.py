"""Fine-tuning: `pretrain.training.run` with a task on annotated pictures, from a backbone's weights.

It is a run like any other: it stops and resumes by the same command, and layer-wise decay and the offsets' lr are
configuration (optimizer.layer_decay, optimizer.offset_lr_scale).
"""

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from data_pipeline.errors import UserError
from data_pipeline.format import open_set
from data_pipeline.reading.config import DataConfig
from data_pipeline.reading.storage.sources import merge_classes
from pretrain.configuration import RunConfig
from pretrain.finetuning.weights import load_into
from pretrain.tasks.classification.task import Classification
from pretrain.tasks.module import TaskModule, image_of
from pretrain.tasks.pretraining.task import Pretraining

if TYPE_CHECKING:
    from pretrain.training.safeguards.interruption import Interruption


def finetune(
    config: RunConfig,
    *,
    source: Path | str | None = None,
    output: Path | str,
    head_rows: Path | str | None = None,
    interruption: "Interruption | None" = None,
) -> int:
    """One rank's whole life; the exit code: 0 done, 75 stopped on request after saving.

    Args:
        config: of task classification, detection, ...; data.sources need what the task learns from.
        source: run directory, checkpoint, exported file or folder, or official .pth that the backbone comes from; None
            takes config.initialize_from, and without that random weights.
        output: run directory, started or resumed; a resumed run reads nothing from `source`.
        head_rows: which row of the source's classifier each class starts from (21,841 classes to 1,000): "names", or a
            file of rows or of names (`weights.read_rows`); None for a new classifier. Of task classification alone.

    Raises UserError (2), BadDataError (3), GaveUpError (4).
    """
    from pretrain.training import run

    if isinstance(config.task, Pretraining):
        raise UserError(
            f"task.name is {config.task.name!r}; fine-tuning needs a task on annotated pictures, as 'classification' "
            "(see configs/finetune_in1k.yaml) or 'instance' (configs/mask_rcnn_1x_coco.yaml)"
        )
    if head_rows is not None and not isinstance(config.task, Classification):
        raise UserError(f"task {config.task.name} has no classifier to take rows for; leave --head-rows out")
    source = source if source is not None else config.initialize_from
    if source is None:
        if head_rows is not None:
            raise UserError("rows of a classifier were given, but no weights to take them from; name a source")
        return run(config, output, interruption=interruption)
    if not Path(source).exists():
        raise UserError(f"{source}: does not exist; give a run directory, a checkpoint or a weights file")
    config = config.model_copy(update={"initialize_from": str(source)})  # what the run's files say of its lineage
    classes = None if head_rows is None else classes_of(config.data)
    start = partial(_start, source=source, head_rows=head_rows, classes=classes)
    return run(config, output, initialize=start, interruption=interruption)


def classes_of(data: DataConfig) -> tuple[str, ...] | None:
    """Names of the labels that a run on these sources has, in the order of their numbers; None where there are none."""
    sets = [open_set(source.path).classes if source.labels else None for source in data.sources]
    return merge_classes(sets)[0]


def _start(
    module: TaskModule, *, source: Path | str, head_rows: Path | str | None, classes: tuple[str, ...] | None
) -> None:
    load_into(image_of(module), source, head_rows=head_rows, classes=classes, say=_say_once)


def _say_once(message: str) -> None:
    """On standard error, where the progress is shown; the leader for all ranks."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(message, file=sys.stderr, flush=True)

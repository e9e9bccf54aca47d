r"""The protocol between a run and its task. Imports no torch: a configuration is read before that is needed.

section of the YAML file -> Task --open_reader--> batches --+
                               \--build--> TaskModule <----+   forward(batch, keys, targets) -> LossOutput
                               \--evaluate(module, set)--> scores, one of which is the main one
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from data_pipeline.errors import UserError
from data_pipeline.reading.config import DataConfig
from pretrain.configuration.schema import ModelConfig, RunConfig, TaskSection

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from data_pipeline.reading import Batch, Targets, TargetSpec
    from data_pipeline.reading.faults import FaultLog
    from data_pipeline.reading.order.course import Segment
    from data_pipeline.reading.storage.sources import SourceRecord
    from pretrain.tasks.module import TaskModule


class BatchReader(Protocol):
    """One rank's batches, endless and a pure function of the step: `data_pipeline.reading.Reader`, or a stand-in.

    epoch_samples: samples of all sources together. fingerprint: equal ones give equal batches. classes: names of the
    labels, in the order of their numbers; None where the sources name none. sources: what stays known of each. faults:
    the samples that were seen and that were bad, so far and on this rank.
    """

    @property
    def epoch_samples(self) -> int: ...
    @property
    def num_classes(self) -> int: ...
    @property
    def classes(self) -> tuple[str, ...] | None: ...
    @property
    def sources(self) -> "tuple[SourceRecord, ...]": ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def faults(self) -> "FaultLog": ...
    def has_labels(self) -> bool: ...
    def batches(self, start_step: int, segments: "Sequence[Segment]" = ()) -> "Iterator[Batch[Targets]]": ...
    def progress(self, step: int) -> dict[str, dict[str, float]]: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class ReaderOptions:
    """What a run tells the reader beside its `data:` section. events: gets one dictionary for each bad sample.
    heartbeat: called while something slow goes on, as the indexing of a set.
    """

    batch_size: int
    accumulation: int
    rank: int
    world_size: int
    seed: int
    events: Callable[[dict[str, Any]], None]
    heartbeat: Callable[[], None]


class MainScore(NamedTuple):
    """The score that says whether a checkpoint is better than another: `score` of the result of `evaluation`."""

    evaluation: str
    score: str
    title: str


class Prediction(NamedTuple):
    """What a task says of one picture. drawn: uint8 [H, W, 3]. results: as COCO's results are written. label_map: uint8
    [H, W], of a task that gives every pixel a class.
    """

    drawn: "NDArray[np.uint8]"
    results: list[dict[str, Any]]
    label_map: "NDArray[np.uint8] | None" = None


class Task(TaskSection, ABC):
    """A task: its settings are the fields, its behaviour the methods. Subclass it, and add fields for your settings.

    Only `build` is needed to train; `evaluations`, `main_score` and `evaluate` are needed to be scored.
    """

    evaluations: ClassVar[tuple[str, ...]] = ()
    main_score: ClassVar[MainScore | None] = None

    @abstractmethod
    def build(self, model: ModelConfig, data: DataConfig, *, classes: int) -> "TaskModule":
        """The module with fresh values of torch's generator. classes: of the data, for where the model names none.

        Raises UserError where task, model and data do not fit together.
        """

    def target_spec(self, data: DataConfig) -> "TargetSpec[Targets]":
        """What is read of each sample besides its views; by default labels, and captions as text."""
        from data_pipeline.reading import ImageText

        return ImageText()

    def planned_side(self, data: DataConfig) -> int:
        """Side of a square that has as many pixels as a view has at most; what a plan counts with."""
        return data.image_size

    @property
    def begins(self) -> bool:
        """Whether these settings name weights that the module's `begin` loads."""
        return False

    def open_reader(self, data: DataConfig, options: ReaderOptions) -> BatchReader:
        """One rank's batches. Raises UserError where a set is missing."""
        from data_pipeline.reading import Reader

        return Reader(
            data,
            self.target_spec(data),
            batch_size=options.batch_size,
            accumulation=options.accumulation,
            rank=options.rank,
            world_size=options.world_size,
            seed=options.seed,
            events=options.events,
            enforce_bad_rate=False,
            heartbeat=options.heartbeat,
        )

    def check_reader(self, reader: BatchReader) -> None:
        """Called before training. Raises UserError where the data cannot serve the task at all."""

    def classes_of(self, weights: "Mapping[str, Tensor]") -> int:
        """The `classes` that `build` needs for a module of these weights: rows of its classifier, 0 without one."""
        return len(weights["image.head.weight"]) if "image.head.weight" in weights else 0

    def refusal(
        self, name: str, module: "TaskModule", data: Path | str, *, classes: Sequence[str] | None
    ) -> str | None:
        """Why this module or this set does not allow evaluation `name`, in a sentence; None where both do."""
        return None

    def evaluate(
        self,
        name: str,
        module: "TaskModule",
        data: Path | str,
        run: RunConfig,
        *,
        classes: Sequence[str] | None,
        batch_size: int,
    ) -> dict[str, Any]:
        """The result (pretrain/evaluation/results.py) of evaluation `name` on the set in `data`.

        classes: names that the module was trained on, as its checkpoint has them: of its classifier's first rows.
        """
        raise UserError(f"task {self.name!r} has no evaluation {name!r}")

    def predict(
        self,
        module: "TaskModule",
        image: bytes,
        run: RunConfig,
        *,
        classes: Sequence[str],
        image_id: int,
        categories: Sequence[int],
        least: float,
    ) -> Prediction:
        """What the module, which is in evaluation mode without gradients, says of an image file.

        classes: their names. image_id, categories: what the results call the picture, and each class. least: score from
        which on something is drawn. Raises BadSample where the image cannot be read, UserError where the task predicts
        nothing.
        """
        raise UserError(f"task {self.name!r} predicts nothing of single pictures")


def task_of(run: RunConfig) -> Task:
    """The task of a run. Raises UserError where the class that `task.name` names is a section, but no Task."""
    if not isinstance(run.task, Task):
        raise UserError(f"task.name {run.task.name!r}: a subclass of pretrain.tasks.task.Task was expected")
    return run.task


def module_of(run: RunConfig, *, classes: int) -> "TaskModule":
    """The module of a run's task, fresh."""
    return task_of(run).build(run.model, run.data, classes=classes)


def main_score_of(task: Task) -> MainScore:
    """Raises UserError where the task has none, so that one checkpoint cannot be called better than another."""
    if task.main_score is None:
        raise UserError(
            f"task {task.name} has no main score by which one checkpoint could be called better than another"
        )
    return task.main_score

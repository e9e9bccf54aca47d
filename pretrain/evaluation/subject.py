"""What is scored: a run or one of its checkpoints, an exported file or folder, or the authors' weights."""

from pathlib import Path
from typing import NamedTuple

from data_pipeline.errors import UserError
from pretrain.configuration import RunConfig, parse_config
from pretrain.evaluation.loading import default_device, load_module
from pretrain.handoff import Backbone, read_backbone
from pretrain.models import official
from pretrain.tasks.module import TaskModule, image_of
from pretrain.tasks.task import module_of
from pretrain.training.checkpoint.disk import AUTO, is_run, run_of


class Subject(NamedTuple):
    """A module in evaluation mode, how it is fed, the names of its classifier's rows, and what people call it.

    folder: where its scores are kept by default; None for a lone file. classifies: whether it has a classifier.
    """

    module: TaskModule
    config: RunConfig
    classes: tuple[str, ...] | None
    source: str
    checkpoint: str
    weights: str
    folder: Path | None
    classifies: bool = True


def open_subject(path: Path | str, which: str = "ema", choice: str = AUTO) -> Subject:
    """Raises UserError where there is nothing to score."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such run, checkpoint or weight file")
    if not is_run(path):
        return _of_backbone(path, read_backbone(path, which))
    module, config, found = load_module(path, which, choice)
    return Subject(
        module,
        config,
        found.trained_on.classes,
        str(found.path),
        found.title,
        found.weights_title(which),
        run_of(path),
    )


def _of_backbone(path: Path, backbone: Backbone) -> Subject:
    """The image model as classification has it: its classifier, and the features below it."""
    if backbone.arguments is None:
        raise UserError(
            f"{backbone.source}: does not say which InternImage it is, and its shapes are no published one's"
        )
    rows = int(backbone.arguments.get("num_classes", 0))
    built_by = ("num_classes", "global_pool")
    config = parse_config(
        {
            "model": {
                "name": "custom",
                "overrides": {k: v for k, v in backbone.arguments.items() if k not in built_by},
            },
            "task": {"name": "classification"},
            "data": {
                "sources": [{"path": "unknown"}],
                "image_size": backbone.image_size,
                "mean": list(backbone.mean),
                "std": list(backbone.std),
            },
            "schedule": {"steps": 1},
        },
        source=backbone.source,
    )
    module = module_of(config, classes=max(rows, 1))  # one row that nothing reads, where there is no classifier
    official.load_state_dict(image_of(module), backbone.state, allow=() if rows else ("head.",))
    return Subject(
        module.eval().to(default_device()),
        config,
        backbone.classes,
        str(path),
        backbone.source,
        str(backbone.origin.get("weights", "weights of a file")),
        path if path.is_dir() else None,
        bool(rows),
    )

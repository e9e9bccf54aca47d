"""From the name of a task to the class of its `task:` section. A task may live outside this package.

task: {name: pretraining, ...}         a task of this package
task: {name: my_module:MyTask, ...}    class MyTask of my_module, which must be importable by every rank
"""

import difflib
import importlib

from data_pipeline.errors import UserError
from pretrain.configuration.schema import TaskSection

DEFAULT = "pretraining"
# Imported on use: a configuration must not wait for the tasks that it does not name.
OWN_TASKS = {
    "pretraining": "pretrain.tasks.pretraining.task:Pretraining",
    "classification": "pretrain.tasks.classification.task:Classification",
    "detection": "pretrain.tasks.detection.task:Detection",
    "instance": "pretrain.tasks.detection.task:Instance",
    "query_detection": "pretrain.tasks.detection.task:QueryDetection",
    "semantic": "pretrain.tasks.segmentation.task:Semantic",
    "query_segmentation": "pretrain.tasks.segmentation.task:QuerySegmentation",
    "query_instance": "pretrain.tasks.segmentation.task:QueryInstance",
}


def task_class(name: object) -> type[TaskSection]:
    """Raises UserError where no task has this name, or where its module or class cannot be imported."""
    path = OWN_TASKS.get(str(name), str(name))
    module, colon, attribute = path.partition(":")
    if not colon:
        near = difflib.get_close_matches(path, OWN_TASKS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UserError(
            f"task.name {name!r}: known are {', '.join(OWN_TASKS)}, and MODULE:CLASS of a task elsewhere.{hint}"
        )
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"task.name {name!r} cannot be imported: {error}") from None
    if not (isinstance(found, type) and issubclass(found, TaskSection)):
        raise UserError(f"task.name {name!r} is no task: a subclass of pretrain.tasks.task.Task was expected")
    return found

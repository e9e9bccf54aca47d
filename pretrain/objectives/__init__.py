"""What a step minimises: the M3I-style objective, and the methods that are special cases of it, behind one interface.

task = build_task(config, classes=9)              # an nn.Module: task.image, task.text, task.projector, ...
teacher = task.teacher()                          # None, or a copy that training averages into
keys = StepKeys(seed, step, micro)
targets = task.targets(teacher, batch, keys)
task(batch, keys, targets).total.backward()       # mean over ranks = the loss of the joined batch
"""

from pretrain.objectives.build import build_task
from pretrain.objectives.keys import StepKeys
from pretrain.objectives.metrics import collapse_alarms
from pretrain.objectives.recipes import RECIPES
from pretrain.objectives.task import LossOutput, Task
from pretrain.objectives.teacher import Teacher
from pretrain.objectives.text import build_tokenizer

__all__ = ["RECIPES", "LossOutput", "StepKeys", "Task", "Teacher", "build_task", "build_tokenizer", "collapse_alarms"]

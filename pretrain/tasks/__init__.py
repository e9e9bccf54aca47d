"""What can be trained, one folder a task. Training, evaluation and hand-off know a task by its protocol alone.

    task.py          Task: the `task:` section of a run, and what a run asks of it (no torch)
    module.py        TaskModule: the torch module that a task builds and training optimises
    pretraining/     image-text pretraining: M3I and the methods that are special cases of it
    classification/  the image model and its classifier, on labels

A task may live outside this package: `task: {name: my_module:MyTask}` (docs/architecture.md).
"""

"""Models, objectives, tasks, training, and what follows from a checkpoint."""

__version__ = "0.2.0"  # of the distribution internimage-pretrain, which reads it from here

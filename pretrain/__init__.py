"""Models, objectives, training, and what follows from a checkpoint."""

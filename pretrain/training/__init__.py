"""Training that cannot lose work: DeepSpeed, the fp32 average, checkpoints by fragments, interruption, metrics.

run(config, output) -> exit code        one rank's whole life (docs/training.md)
checkpoints.load_weights(path, which)   full fp32 tensors by name, in one process
"""

from typing import Any

__all__ = ["load_weights", "run"]


def __getattr__(name: str) -> Any:
    # Late, so that reading a checkpoint does not import the training stack, nor naming the package torch.
    if name == "run":
        from pretrain.training.rank import run

        return run
    if name == "load_weights":
        from pretrain.training.checkpoint.disk import load_weights

        return load_weights
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Training that cannot lose work, for any task (docs/training.md). `run(config, output)` is one rank's whole life.

rank         composes a run from its configuration    loop        the steps
zero         all that knows DeepSpeed                 checkpoint  written by all ranks, read by one process
safeguards   stops, hangs, divergence, bad samples    logging     events, metrics, progress
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pretrain.training.rank import run

__all__ = ["run"]


def __getattr__(name: str) -> object:
    # Late, so that reading a checkpoint does not import the training stack, nor naming the package torch.
    if name == "run":
        from pretrain.training.rank import run

        return run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

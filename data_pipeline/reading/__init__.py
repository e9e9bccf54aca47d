"""From shards to batches: order -> read -> decode -> views -> batch.

hashing       every random number is a hash of what it is for
order         (seed, epoch, position) -> sample          mixture    position -> source
shards        reads by offset, says what is wrong        sources    opens the configured sets
decode        bytes -> pixels                            views      crops and antialiased resize
augmentation  colours, RandAugment, erasing
assembly      positions -> rows of a batch               pool       worker processes
reader        Reader: the batches of one rank            evaluation whole sets, centre crops
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_pipeline.reading.batch import Batch, SampleRef, normalize
    from data_pipeline.reading.config import DataConfig
    from data_pipeline.reading.evaluation import evaluation_batches
    from data_pipeline.reading.reader import Reader

__all__ = ["Batch", "DataConfig", "Reader", "SampleRef", "evaluation_batches", "normalize"]

_HOMES = {
    "Batch": "batch",
    "SampleRef": "batch",
    "normalize": "batch",
    "DataConfig": "config",
    "evaluation_batches": "evaluation",
    "Reader": "reader",
}


def __getattr__(name: str) -> Any:
    """Loads on use: the configuration reads `config` from here, and must not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)

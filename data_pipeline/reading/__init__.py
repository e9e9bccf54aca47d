"""From shards to batches: order -> read -> decode -> views and typed targets -> batch.

hashing       every random number is a hash of what it is for
order         (seed, epoch, position) -> sample          mixture    position -> source
shards        reads by offset, says what is wrong        sources    opens the configured sets
decode        bytes -> pixels                            views      crops and antialiased resize
augmentation  colours, RandAugment, erasing
targets       what a task wants besides views            image_text captions and labels
builder       positions -> arrays of a batch             pool       worker processes
reader        Reader: the batches of one rank            evaluation whole sets, centre crops
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_pipeline.reading.batch import Batch, SampleRef, normalize
    from data_pipeline.reading.config import DataConfig
    from data_pipeline.reading.evaluation import evaluation_batches
    from data_pipeline.reading.image_text import ImageText, ImageTextTargets
    from data_pipeline.reading.reader import Reader
    from data_pipeline.reading.targets import Targets, TargetSource, TargetSpec

__all__ = [
    "Batch",
    "DataConfig",
    "ImageText",
    "ImageTextTargets",
    "Reader",
    "SampleRef",
    "TargetSource",
    "TargetSpec",
    "Targets",
    "evaluation_batches",
    "normalize",
]

_HOMES = {
    "Batch": "batch",
    "SampleRef": "batch",
    "normalize": "batch",
    "DataConfig": "config",
    "ImageText": "image_text",
    "ImageTextTargets": "image_text",
    "TargetSource": "targets",
    "TargetSpec": "targets",
    "Targets": "targets",
    "evaluation_batches": "evaluation",
    "Reader": "reader",
}


def __getattr__(name: str) -> Any:
    """Loads on use: the configuration reads `config` from here, and must not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)

"""From shards to batches: order -> read -> decode -> views and typed targets -> batch.

order/       (seed, epoch, position) -> source, shard, row; which positions a rank reads
storage/     opens the configured sets, reads samples by offset, fetches remote shards ahead of need
decode/      bytes -> pixels -> crops, antialiased resize, augmentation
targets      what a task wants of a sample besides its views        image_text   captions and labels
workers/     positions -> a batch's arrays, in processes, with bad samples replaced
reader       Reader: the batches of one rank                        evaluation   whole sets, centre crops
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
    "Batch", "DataConfig", "ImageText", "ImageTextTargets", "Reader", "SampleRef", "TargetSource", "TargetSpec",
    "Targets", "evaluation_batches", "normalize",
]  # fmt: skip

_MODULES = {
    "batch": ("Batch", "SampleRef", "normalize"),
    "config": ("DataConfig",),
    "evaluation": ("evaluation_batches",),
    "image_text": ("ImageText", "ImageTextTargets"),
    "reader": ("Reader",),
    "targets": ("TargetSource", "TargetSpec", "Targets"),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Loads on use: the configuration reads `config` from here, and must not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)

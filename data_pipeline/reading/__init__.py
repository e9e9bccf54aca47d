"""From shards to batches: order -> read -> decode -> views and typed targets -> batch.

order/       (seed, epoch, position) -> source, shard, row; which positions a rank reads
storage/     opens the configured sets, reads samples by offset, fetches remote shards ahead of need
decode/      bytes -> pixels -> crops, antialiased resize, augmentation
targets      what a task wants of a sample besides its views        image_text   captions and labels
workers/     positions -> a batch's arrays, in processes, with bad samples replaced
reader       Reader: the batches of one rank                        evaluation   whole sets, centre crops
"""

from typing import TYPE_CHECKING

from data_pipeline.lazy import names_on_use

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

# The configuration reads `config` from here, and must not wait for torch.
__getattr__ = names_on_use(
    __name__,
    {
        "batch": ("Batch", "SampleRef", "normalize"),
        "config": ("DataConfig",),
        "evaluation": ("evaluation_batches",),
        "image_text": ("ImageText", "ImageTextTargets"),
        "reader": ("Reader",),
        "targets": ("TargetSource", "TargetSpec", "Targets"),
    },
)

"""From URL lists, folders and tables to shards. Never imports torch.

pack      local images and captions            packing, rows, images
index, verify, stats                           inspection
openmoji  the embedded set                     openmoji, emoji_drawings, emoji_concepts
samples   a shard on disk as one act           plan: one run at a time, resumed only with the plan it began with
"""

from data_pipeline.preparation.fetching.fetch import FetchSummary, fetch
from data_pipeline.preparation.fetching.web import WebRules
from data_pipeline.preparation.inspection import IndexSummary, Stats, VerifySummary, index, stats, verify
from data_pipeline.preparation.packing.images import ImageRules
from data_pipeline.preparation.packing.pack import PackSummary, pack
from data_pipeline.preparation.sources.rows import Columns

__all__ = [
    "Columns",
    "FetchSummary",
    "ImageRules",
    "IndexSummary",
    "PackSummary",
    "Stats",
    "VerifySummary",
    "WebRules",
    "fetch",
    "index",
    "pack",
    "stats",
    "verify",
]

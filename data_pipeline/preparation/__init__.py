"""Makes shards from URL lists, folders and tables. Never imports torch.

sources/     folders, tables, the embedded set
fetching/    URLs to images: limits, robots.txt, retries
packing/     images to shards; one run at a time, resumed only with the plan it began with
annotations/ the same with COCO's objects or label maps
inspection   index, verify
statistics   stats
"""

from typing import TYPE_CHECKING

from data_pipeline.lazy import names_on_use

if TYPE_CHECKING:
    from data_pipeline.preparation.annotations.pack import AnnotatedSummary, pack_coco, pack_label_maps
    from data_pipeline.preparation.fetching.fetch import FetchSummary, fetch
    from data_pipeline.preparation.fetching.web import WebRules
    from data_pipeline.preparation.inspection import IndexSummary, VerifySummary, index, verify
    from data_pipeline.preparation.packing.pack import PackSummary, pack
    from data_pipeline.preparation.packing.rules import ImageRules
    from data_pipeline.preparation.packing.usable import check_usable
    from data_pipeline.preparation.sources.columns import Columns, TableFormat
    from data_pipeline.preparation.statistics import Stats, stats

__all__ = [
    "AnnotatedSummary", "Columns", "FetchSummary", "ImageRules", "IndexSummary", "PackSummary", "Stats", "TableFormat",
    "VerifySummary", "WebRules", "check_usable", "fetch", "index", "pack", "pack_coco", "pack_label_maps", "stats",
    "verify",
]  # fmt: skip

# A process that decodes needs no HTTP client, and starts in a third of the time without.
__getattr__ = names_on_use(
    __name__,
    {
        "annotations.pack": ("AnnotatedSummary", "pack_coco", "pack_label_maps"),
        "fetching.fetch": ("FetchSummary", "fetch"),
        "fetching.web": ("WebRules",),
        "inspection": ("IndexSummary", "VerifySummary", "index", "verify"),
        "packing.rules": ("ImageRules",),
        "packing.pack": ("PackSummary", "pack"),
        "packing.usable": ("check_usable",),
        "sources.columns": ("Columns", "TableFormat"),
        "statistics": ("Stats", "stats"),
    },
)

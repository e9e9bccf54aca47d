"""The shard contract: WebDataset tars, their Parquet sidecars, the set's manifest. `docs/shards.md` is its one page.

files     whole or not at all: temporary name, fsync, rename
ustar     tar headers: byte-stable encoder, walk over any archive that names its damage
writer    ShardWriter
probe     format and size of an image from its first bytes
index     index_shard: what is in a shard that anybody made
reasons   why a sample has no image, or what it lacks
sidecar   the Parquet file beside a shard
manifest  the set
sets      open_set: by manifest, or by indexing foreign shards once
"""

from typing import TYPE_CHECKING

from data_pipeline.lazy import names_on_use

if TYPE_CHECKING:
    from data_pipeline.format.index import index_shard
    from data_pipeline.format.manifest import Manifest, ShardEntry, read_manifest, write_manifest
    from data_pipeline.format.sets import index_set, open_set
    from data_pipeline.format.sidecar import count_reasons, packed_rows, read_sidecar, slot_rows, write_sidecar
    from data_pipeline.format.writer import Place, ShardWriter

__all__ = [
    "Manifest", "Place", "ShardEntry", "ShardWriter", "count_reasons", "index_set", "index_shard", "open_set",
    "packed_rows", "read_manifest", "read_sidecar", "slot_rows", "write_manifest", "write_sidecar",
]  # fmt: skip

# A process that only decodes images needs no Parquet.
__getattr__ = names_on_use(
    __name__,
    {
        "index": ("index_shard",),
        "manifest": ("Manifest", "ShardEntry", "read_manifest", "write_manifest"),
        "sets": ("index_set", "open_set"),
        "sidecar": ("count_reasons", "packed_rows", "read_sidecar", "slot_rows", "write_sidecar"),
        "writer": ("Place", "ShardWriter"),
    },
)

"""`internimage shards publish`: copies a set to object storage, so that a broken copy is never taken for a set.

URL/00000.tar, 00000.parquet, 00000_stats.json
    00000.published.json    digests of these three, written behind them: the shard is there
    manifest.json           removed before anything changes, written last
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from data_pipeline.callbacks import ProgressCallback
from data_pipeline.curation.decisions import SetPath, open_settled
from data_pipeline.errors import StoppedError, UserError
from data_pipeline.executors.units import stop_requests
from data_pipeline.format import Manifest, ShardEntry
from data_pipeline.format.manifest import SET_MANIFEST
from data_pipeline.format.sets import SHARD_INDEX_SUFFIX
from data_pipeline.preparation.packing.away import Storage, opened_storage, send_shard

_BESIDE = ("sizes.json", "plan.json")


@dataclass(frozen=True)
class PublishSummary:
    """copied: shards that were not there, or were other ones."""

    url: str
    shards: int
    copied: int
    bytes: int


def publish(
    path: SetPath, url: str, *, connections: int = 8, progress: ProgressCallback | None = None
) -> PublishSummary:
    """Copies the set to `url` (any fsspec URL); files that are there already, by digest, are left alone.

    A killed or stopped run goes on there. Raises UserError for a set whose index lies elsewhere, and for a URL that
    cannot be written; StoppedError after SIGUSR1 or SIGTERM.
    """
    one = open_settled(path)
    if any(entry.sidecar.endswith(SHARD_INDEX_SUFFIX) for entry in one.shards):
        raise UserError(f"{one.folder} is a foreign set with an index; write it anew first: internimage shards reshard")
    with opened_storage(url) as (remote, root):
        remote.makedirs(root, exist_ok=True)
        return _publish(one, remote, root, url, connections, progress)


def _publish(
    one: Manifest, remote: Storage, root: str, url: str, connections: int, progress: ProgressCallback | None
) -> PublishSummary:
    text = (one.index_folder / SET_MANIFEST).read_bytes()
    manifest = f"{root}/{SET_MANIFEST}"
    if remote.exists(manifest):
        if remote.cat_file(manifest) == text:
            return PublishSummary(url, len(one.shards), 0, 0)
        remote.rm_file(manifest)
    copied = size = 0
    with stop_requests() as stopping, ThreadPoolExecutor(connections) as threads:

        def copy(entry: ShardEntry) -> int:
            return 0 if stopping() else send_shard(one.folder, entry, remote, root)

        for done, count in enumerate(threads.map(copy, one.shards)):
            copied += count > 0
            size += count
            if progress is not None:
                progress(done + 1, len(one.shards))
        if stopping():
            raise StoppedError(f"stopped behind the shards under way, as asked; the same command goes on at {url}")
    for name in _BESIDE:
        if (one.folder / name).exists():
            remote.pipe_file(f"{root}/{name}", (one.folder / name).read_bytes())
    remote.pipe_file(manifest, text)
    return PublishSummary(url, len(one.shards), copied, size)

"""Rows of finished shards that are made anew because of the reason for which they were rejected."""

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from data_pipeline.format import ShardEntry, read_sidecar
from data_pipeline.format.sidecar import REJECTED, TAKEN_DOWN
from data_pipeline.preparation.packing.samples import Sample, read_samples


def wanted_again(folder: Path, entry: ShardEntry, patterns: Sequence[str]) -> dict[int, str]:
    """Returns the reasons of the rejected rows that a pattern (`timeout`, `http_5*`) matches, by row, from the sidecar
    alone. What was taken down is never wanted again."""
    rows = read_sidecar(folder / entry.sidecar, ["row", "status", "reason"]).to_pylist()
    return {
        row["row"]: row["reason"]
        for row in rows
        if row["status"] == REJECTED
        and not row["reason"].startswith(TAKEN_DOWN)
        and any(fnmatchcase(row["reason"], pattern) for pattern in patterns)
    }


def unchanged(former: Mapping[int, str], fresh: Mapping[int, Sample]) -> bool:
    """Tells whether rows made anew are all rejected for the former reasons, so that their shard may stay as it is."""
    return all(sample.image is None and sample.reason == former[row] for row, sample in fresh.items())


def merged(folder: Path, entry: ShardEntry, fresh: Mapping[int, Sample]) -> Iterator[Sample]:
    """Yields the samples of a shard in their order, those in `fresh` (by row) in place of the former ones."""
    for sample in read_samples(folder, entry):
        yield fresh.get(sample.row, sample)

"""Reads sources that cannot seek (`pipe:curl -s https://... | ...`) through webdataset, as exactly as they allow.

Kept: every rank has a batch at every step, views and captions as elsewhere, bad samples recorded. Lost, and said once
at the start: shards are drawn with replacement, so that an epoch is a number and not every sample once; batches depend
on the number of ranks; a resumed run goes on with other samples than an unbroken one would have had.
"""

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import webdataset

from data_pipeline.errors import UserError
from data_pipeline.hashing import Integers, key
from data_pipeline.reading.batch import SampleRef
from data_pipeline.reading.config import DataConfig, SourceConfig
from data_pipeline.reading.decode.pixels import BadSample
from data_pipeline.reading.faults import STREAM_DAMAGED, Fault
from data_pipeline.reading.order.mixture import Mixture
from data_pipeline.reading.storage.shards import RawSample
from data_pipeline.reading.workers.builder import Filled, RowCandidate, RowFiller
from data_pipeline.reading.workers.memory import Arrays, allocate

_IMAGES = ("jpg", "jpeg", "png", "webp")
_SIDECAR_NAMES = {"txt": "text"}  # extension -> the sidecar's name for the member, where they differ
_Name = TypeVar("_Name")
_PURPOSE, _MOST_IN_A_ROW, _MOST_SHARDS_IN_A_ROW, _BUFFER = 6, 1000, 100, 1000
INEXACT = (
    "pipe: sources cannot seek: shards are drawn with replacement, batches depend on the number of ranks, "
    "and a resumed run goes on with other samples"
)


def check_streams(config: DataConfig) -> bool:
    """Tells whether the sources are streams. Raises UserError where only some are, or where one's size is not given."""
    streams = [source.path.startswith("pipe:") for source in config.sources]
    if not any(streams):
        return False
    for number, source in enumerate(config.sources):
        if not streams[number]:
            raise UserError(
                f"data.sources.{number}.path {source.path!r}: pipe: sources do not mix with sets that can seek"
            )
        if source.samples is None:
            raise UserError(
                f"data.sources.{number}.samples is missing: how many samples make an epoch of {source.path!r}"
            )
    return True


class Streams:
    """Builds the batches of one rank from streams."""

    def __init__(
        self, config: DataConfig, filler: RowFiller, names: Sequence[str], rank: int, world_size: int, seed: int
    ) -> None:
        self._sources, self._filler, self._names = config.sources, filler, names
        self._mixture = Mixture([source.weight for source in config.sources], seed=seed)
        self._seeds = (seed, rank, world_size)
        self._damage = [_Damage(source) for source in config.sources]

    def run(
        self, start: int, tasks: Iterable[tuple[_Name, Integers]]
    ) -> Iterator[tuple[_Name, Integers, Arrays, Filled]]:
        """(name, positions) -> (name, positions, arrays, what goes with them); `start`: the tasks' first step."""
        streams = [
            iter(_open(source, key(*self._seeds, _PURPOSE, number, start), damage))
            for number, (source, damage) in enumerate(zip(self._sources, self._damage, strict=True))
        ]
        for name, positions in tasks:
            arrays, filled = allocate(self._filler.layout(len(positions))), Filled.empty(len(positions))
            chosen = self._mixture.locate(positions)[0].tolist()
            chances = self._filler.chances(positions)
            for row, (position, source) in enumerate(zip(positions.tolist(), chosen, strict=True)):
                failed: list[tuple[RowCandidate, BadSample]] = []
                candidates = self._candidates(source, streams[source], failed)
                self._filler.fill(row, position, source, chances[row].tolist(), candidates, failed, arrays, filled)
                filled.samples[row] = filled.samples[row]._replace(shard="")  # a command is no shard
                filled.faults += self._damage[source].take(position, self._names[source])
            self._filler.finish(arrays, filled)
            yield name, positions, arrays, filled

    def _candidates(
        self, source: int, stream: Iterator[dict[str, Any]], failed: list[tuple[RowCandidate, BadSample]]
    ) -> Iterator["_Streamed"]:
        for sample in stream:
            self._damage[source].in_a_row = 0
            found = _Streamed(self._names[source], sample)
            yield found
            if len(failed) > _MOST_IN_A_ROW:
                raise UserError(
                    f"{found.ref().shard}: {len(failed)} samples in a row cannot be used, the last: {failed[-1][1]}"
                )
        raise UserError(f"{self._sources[source].path} gives no samples: run its command by hand")


@dataclass(frozen=True)
class _Streamed:
    """A sample as webdataset gives it."""

    source: str
    members: dict[str, Any]

    def read(self) -> RawSample:
        image = next((self.members[kind] for kind in _IMAGES if kind in self.members), None)
        if image is None:
            raise BadSample("image_missing", "the sample has no image")
        named = {_SIDECAR_NAMES.get(name, name): data for name, data in self.members.items() if isinstance(data, bytes)}
        return RawSample(str(self.members["__key__"]), image, _caption(self.members), None, members=named)

    def ref(self) -> SampleRef:
        return SampleRef(self.source, str(self.members["__url__"]), str(self.members["__key__"]))


class _Damage:
    """Collects the shards of a source that webdataset could not read; webdataset goes on with the next shard."""

    def __init__(self, source: SourceConfig) -> None:
        self._path = source.path
        self.noticed: list[tuple[str, str]] = []  # shard, what was wrong
        self.in_a_row = 0

    def __call__(self, error: Exception) -> bool:
        """Handles webdataset's errors. Raises UserError where it can read nothing: drawn shards never end."""
        if not (error.args and isinstance(error.args[-1], str) and error.args[-1].startswith("pipe:")):
            return True  # webdataset calls the handler again for this error, then with the shard's name
        self.noticed.append((error.args[-1], f"{type(error).__name__}: {error.args[0]}"))
        self.in_a_row += 1
        if self.in_a_row > _MOST_SHARDS_IN_A_ROW:
            raise UserError(
                f"{self._path} gives no samples ({self.in_a_row} shards in a row, the last: {self.noticed[-1][1]}): "
                "run its command by hand"
            )
        return True

    def take(self, position: int, name: str) -> list[Fault]:
        """Returns the damaged shards noticed since the last call: faults of shards, not of the sample at `position`."""
        noticed, self.noticed = self.noticed, []
        return [Fault(position, name, shard, "", -1, STREAM_DAMAGED, detail, None) for shard, detail in noticed]


def _open(source: SourceConfig, seed: int, damage: _Damage) -> Any:
    return webdataset.DataPipeline(
        webdataset.ResampledShards(source.path, seed=seed, deterministic=True),
        webdataset.tarfile_to_samples(handler=damage),
        webdataset.shuffle(_BUFFER, rng=random.Random(seed)),
    )


def _caption(sample: dict[str, Any]) -> str | None:
    try:
        if "txt" in sample:
            return sample["txt"].decode("utf-8").strip() or None
        found = json.loads(sample.get("json", b"{}"))
        caption = found.get("caption") if isinstance(found, dict) else None
        return caption if isinstance(caption, str) else None
    except ValueError:
        return None

"""Sources that cannot seek (`pipe:curl -s https://... | ...`), through webdataset, with what exactness they allow.

Kept: every rank has a batch at every step, views and captions as elsewhere, bad samples recorded. Lost, and said once
at the start: shards are drawn with replacement, so that an epoch is a number and not every sample once; batches depend
on the number of ranks; a resumed run goes on with other samples than an unbroken one would have had.
"""

import json
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import webdataset

from data_pipeline.errors import UserError
from data_pipeline.reading.assembly import Assembled, Fault, Rows, Tokenizer, draw_views, view_stream, write_tokens
from data_pipeline.reading.config import DataConfig, SourceConfig
from data_pipeline.reading.decode import BadSample
from data_pipeline.reading.hashing import Integers, key, uniforms
from data_pipeline.reading.mixture import Mixture
from data_pipeline.reading.views import UNIFORMS

IMAGES = ("jpg", "jpeg", "png", "webp")
_PURPOSE, _MOST_IN_A_ROW, _MOST_SHARDS_IN_A_ROW, _BUFFER = 6, 1000, 100, 1000
LOST = (
    "pipe: sources cannot seek: shards are drawn with replacement, batches depend on the number of ranks, "
    "and a resumed run goes on with other samples"
)


def is_stream(source: SourceConfig) -> bool:
    return source.path.startswith("pipe:")


def check_streams(config: DataConfig) -> bool:
    """Whether the sources are streams. Raises UserError where only some are, or where one's size is not given."""
    streams = [is_stream(source) for source in config.sources]
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
    """The rows of one rank, from streams."""

    def __init__(self, config: DataConfig, tokenizer: Tokenizer | None, rank: int, world_size: int, seed: int) -> None:
        self.names = [source.name or f"stream-{number}" for number, source in enumerate(config.sources)]
        self._config, self._tokenizer = config, tokenizer
        self._mixture = Mixture([source.weight for source in config.sources], seed=seed)
        self._seeds = (seed, rank, world_size)
        self._stream = view_stream(seed)
        self._damage = [_Damage(source) for source in config.sources]

    def fill(self, shapes: Any, start: int, tasks: Iterator[tuple[Any, Integers]]) -> Iterator[Any]:
        """(name, positions) -> (name, positions, rows, what goes with them), for tasks that begin with step `start`."""
        sources = [
            iter(_open(source, key(*self._seeds, _PURPOSE, number, start), damage))
            for number, (source, damage) in enumerate(zip(self._config.sources, self._damage, strict=True))
        ]
        for name, positions in tasks:
            rows = Rows(*(np.empty(shape, dtype) for shape, dtype in shapes))
            done = Assembled([(0, 0, 0, "")] * len(positions), [None] * len(positions))
            chosen = self._mixture.locate(positions)[0]
            chances = uniforms(self._stream, positions, UNIFORMS * self._config.views)
            for i, position in enumerate(positions.tolist()):
                self._fill_row(i, position, int(chosen[i]), sources[chosen[i]], chances, rows, done)
            write_tokens(self._tokenizer, done.captions, rows)
            yield name, positions, rows, done

    def _fill_row(
        self,
        i: int,
        position: int,
        source: int,
        samples: Iterator[dict[str, Any]],
        chances: np.ndarray,
        rows: Rows,
        done: Assembled,
    ) -> None:
        failed: list[tuple[str, str, BadSample]] = []
        damage = self._damage[source]
        for sample in samples:
            damage.in_a_row = 0
            shard, name = str(sample["__url__"]), str(sample["__key__"])
            data = next((sample[kind] for kind in IMAGES if kind in sample), None)
            try:
                if data is None:
                    raise BadSample("image_missing", "the sample has no image")
                draw_views(
                    data, self._config, self._stream, position, chances[i].tolist(), rows.views[i], rows.crops[i]
                )
                break
            except BadSample as bad:
                failed.append((shard, name, bad))
                if len(failed) > _MOST_IN_A_ROW:
                    raise UserError(
                        f"{shard}: {len(failed)} samples in a row cannot be used, the last: {bad}"
                    ) from None
        else:
            raise UserError(f"{self._config.sources[source].path} gives no samples: run its command by hand")
        caption = _caption(sample) if self._config.sources[source].captions and self._tokenizer else None
        rows.has_text[i], rows.labels[i], rows.has_label[i] = caption is not None, -1, False
        done.captions[i], done.samples[i] = caption, (source, -1, -1, name)
        done.faults += [
            Fault(position, self.names[source], bad_shard, bad_name, -1, bad.reason, bad.detail, (shard, name))
            for bad_shard, bad_name, bad in failed
        ]
        # Of shards, not of this sample, but noticed since the one before it was read.
        done.faults += [
            Fault(position, self.names[source], shard, "", -1, "stream_damaged", detail, None)
            for shard, detail in damage.noticed
        ]
        damage.noticed.clear()


class _Damage:
    """What webdataset could not read of a source; it goes on with the next shard."""

    def __init__(self, source: SourceConfig) -> None:
        self._path = source.path
        self.noticed: list[tuple[str, str]] = []  # shard, what was wrong
        self.in_a_row = 0

    def __call__(self, error: Exception) -> bool:
        """webdataset's handler. Raises UserError where nothing can be read: shards drawn with replacement never end."""
        if not (error.args and isinstance(error.args[-1], str) and error.args[-1].startswith("pipe:")):
            return True  # it comes again, with its shard
        self.noticed.append((error.args[-1], f"{type(error).__name__}: {error.args[0]}"))
        self.in_a_row += 1
        if self.in_a_row > _MOST_SHARDS_IN_A_ROW:
            raise UserError(
                f"{self._path} gives no samples ({self.in_a_row} shards in a row, the last: {self.noticed[-1][1]}): "
                "run its command by hand"
            )
        return True


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

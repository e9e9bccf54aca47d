"""From positions to a batch's rows: locate, read, decode, cut views, replace what is bad. Runs in workers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.errors import BadDataError
from data_pipeline.reading.augmentation import augment
from data_pipeline.reading.config import DataConfig
from data_pipeline.reading.decode import BadSample, Pixels, can_reduce, decode, read_header
from data_pipeline.reading.hashing import Integers, key, uniforms
from data_pipeline.reading.order import Order
from data_pipeline.reading.shards import RawSample, ShardSet
from data_pipeline.reading.views import UNIFORMS, Crop, enlarged, on_reduced, random_crop, reduction, render

Tokenizer = Callable[[list[str]], Any]
_AUGMENT = 5  # purpose of hash keys
_CAPTIONS_KEPT = 8192
_NEAR, _FAR = 8, 24  # replacements tried in the same block, then in the whole source


def view_stream(seed: int) -> int:
    """The hash key of all randomness in views."""
    return key(seed, _AUGMENT)


class Rows(NamedTuple):
    """Arrays that a batch's rows are written into; B rows, V views, L tokens."""

    views: np.ndarray  # uint8 [B, V, S, S, 3]
    crops: np.ndarray  # float32 [B, V, 6]
    tokens: np.ndarray  # int64 [B, L]
    has_text: np.ndarray  # bool [B]
    labels: np.ndarray  # int64 [B]
    has_label: np.ndarray  # bool [B]

    @staticmethod
    def shapes(rows: int, views: int, size: int, tokens: int) -> list[tuple[tuple[int, ...], type[np.generic]]]:
        return [
            ((rows, views, size, size, 3), np.uint8),
            ((rows, views, 6), np.float32),
            ((rows, tokens), np.int64),
            ((rows,), np.bool_),
            ((rows,), np.int64),
            ((rows,), np.bool_),
        ]

    @classmethod
    def empty(cls, rows: int, views: int, size: int, tokens: int) -> "Rows":
        return cls(*(np.empty(shape, dtype) for shape, dtype in cls.shapes(rows, views, size, tokens)))


class Fault(NamedTuple):
    """Something to record about a row. `replaced_by` is (shard, key), or None where the sample was used as it is."""

    position: int
    source: str
    shard: str
    key: str
    row: int
    reason: str
    detail: str
    replaced_by: tuple[str, str] | None


@dataclass
class Assembled:
    """What goes with the arrays: (source number, shard number, row, key) and caption of each row, and faults."""

    samples: list[tuple[int, int, int, str]]
    captions: list[str | None]
    faults: list[Fault] = field(default_factory=list)


class Assembler:
    """Fills batches. A pure function of the positions asked for (and of the shards)."""

    def __init__(
        self,
        config: DataConfig,
        order: Order,
        names: Sequence[str],
        sets: Sequence[ShardSet],
        labels: Sequence[np.ndarray | None],
        tokenizer: Tokenizer | None,
        seed: int,
    ) -> None:
        self._config = config
        self._order = order
        self._sets = sets
        self._labels = labels  # per source: its label -> label of the mixture
        self._tokenizer = None if tokenizer is None else Remembered(tokenizer)
        self._stream = view_stream(seed)
        self._names = names

    def fill(self, positions: Integers, rows: Rows) -> Assembled:
        """Writes the samples at `positions`, int64 [B], into `rows`."""
        sources, indices = self._order.indices(positions)
        located = self._order.locate(positions)
        chances = uniforms(self._stream, positions, UNIFORMS * self._config.views)
        count = len(positions)
        done = Assembled([(0, 0, 0, "")] * count, [None] * count)
        for i in np.lexsort((located.row, located.shard, sources)):  # shard by shard, in file order
            self._fill_row(
                int(i),
                int(positions[i]),
                int(sources[i]),
                int(indices[i]),
                int(located.shard[i]),
                int(located.row[i]),
                chances[i].tolist(),
                rows,
                done,
            )
        write_tokens(self._tokenizer, done.captions, rows)
        done.faults.sort(key=lambda fault: fault.position)
        return done

    def _fill_row(
        self,
        i: int,
        position: int,
        source: int,
        index: int,
        shard: int,
        row: int,
        chances: list[float],
        rows: Rows,
        done: Assembled,
    ) -> None:
        failed: list[tuple[int, int, BadSample]] = []
        while True:
            try:
                raw = self._sets[source].shard(shard).read(row)
                draw_views(raw.image, self._config, self._stream, position, chances, rows.views[i], rows.crops[i])
                break
            except BadSample as fault:
                failed.append((shard, row, fault))
                shard, row = self._replacement(source, index, failed)
        self._describe(i, source, raw, rows, done)
        done.samples[i] = (source, shard, row, raw.key)
        name = self._sets[source].manifest.shards[shard].name
        for bad_shard, bad_row, bad in failed:
            opened = self._sets[source].shard(bad_shard)
            bad_name = self._sets[source].manifest.shards[bad_shard].name
            done.faults.append(
                Fault(
                    position,
                    self._names[source],
                    bad_name,
                    opened.key(bad_row),
                    bad_row,
                    bad.reason,
                    bad.detail,
                    (name, raw.key),
                )
            )
        if raw.note and (self._config.sources[source].captions or "text" not in raw.note):
            done.faults.append(Fault(position, self._names[source], name, raw.key, row, raw.note, "", None))

    def _replacement(self, source: int, index: int, failed: list[tuple[int, int, BadSample]]) -> tuple[int, int]:
        """Where the next try lies: a function of the position alone, near first."""
        tried = len(failed) - 1
        order = self._order.sources[source]
        if tried >= _NEAR + _FAR:
            reasons = "; ".join(
                sorted({f"{self._sets[source].manifest.shards[s].name}: {f}" for s, _, f in failed})[:4]
            )
            raise BadDataError(
                f"source {self._names[source]}: {len(failed)} samples in a row cannot be used, among them {reasons}. "
                "Check the shards with `internimage shards verify`"
            )
        near = tried < _NEAR
        choices = order.neighbours(index, tried + 1) if near else order.anywhere(index, tried - _NEAR + 1)
        _, shards, found = order.locate(choices[-1:])
        return int(shards[0]), int(found[0])

    def _describe(self, i: int, source: int, raw: RawSample, rows: Rows, done: Assembled) -> None:
        chosen = self._config.sources[source]
        caption = raw.caption if chosen.captions and self._tokenizer is not None else None
        done.captions[i] = caption
        rows.has_text[i] = caption is not None
        labels, label = self._labels[source], raw.label
        known = chosen.labels and labels is not None and label is not None and label < len(labels)
        rows.labels[i] = labels[label] if known and labels is not None and label is not None else -1
        rows.has_label[i] = known


def draw_views(
    data: bytes, config: DataConfig, stream: int, position: int, chances: list[float], views: Pixels, crops: np.ndarray
) -> None:
    """Decodes `data` and writes its views, uint8 [V, S, S, 3], and their crops, float32 [V, 6]. `chances`: UNIFORMS
    numbers a view. Raises BadSample."""
    augmentation = config.augmentation
    header = read_header(data, config.max_pixels)
    boxes: list[Crop] = [
        random_crop(
            header.width,
            header.height,
            chances[v * UNIFORMS : (v + 1) * UNIFORMS],
            augmentation.scale,
            augmentation.ratio,
            augmentation.flip,
        )
        for v in range(config.views)
    ]
    reduce = reduction(boxes, config.image_size) if can_reduce(header) else 1
    pixels = decode(data, header, reduce)
    for v, box in enumerate(boxes):
        if reduce > 1:
            box = on_reduced(box, reduce, pixels)
        render(pixels, box, views[v])
        crops[v] = enlarged(box, reduce) if reduce > 1 else box
        augment(views[v], augmentation, stream, position, v)


class Remembered:
    """A tokenizer that keeps the tokens of the last few thousand captions: a small set says the same in every epoch."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._kept: dict[str, np.ndarray] = {}

    def __call__(self, captions: list[str]) -> np.ndarray:
        """int64 [len(captions), L]."""
        new = list(dict.fromkeys(caption for caption in captions if caption not in self._kept))
        if len(self._kept) + len(new) > _CAPTIONS_KEPT:
            self._kept.clear()
            new = list(dict.fromkeys(captions))
        if new:
            self._kept.update(zip(new, np.asarray(self._tokenizer(new)), strict=True))
        return np.stack([self._kept[caption] for caption in captions])


def write_tokens(tokenizer: Tokenizer | None, captions: list[str | None], rows: Rows) -> None:
    """Tokens of the captions there are; zeros elsewhere."""
    rows.tokens[:] = 0
    have = [i for i, caption in enumerate(captions) if caption is not None]
    if have and tokenizer is not None:
        rows.tokens[have] = np.asarray(tokenizer([captions[i] or "" for i in have]))

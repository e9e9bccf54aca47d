"""`internimage shards stats`: a set in numbers, from its sidecars alone, in memory that does not grow with the set.

sidecars  ->  one summary a shard (processes)  ->  joined in order
              histograms of whole numbers: exact up to 65,536 different values, beyond that to three digits
              digests: 64 bits of each, by their first byte on disk, counted one part at a time
"""

import tempfile
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from data_pipeline.callbacks import ProgressCallback
from data_pipeline.executors.processes import available, ordered_map
from data_pipeline.format import count_reasons, open_set, packed_rows, read_sidecar
from data_pipeline.format.sidecar import DROPPED, ERASED

_EXACT_VALUES = 65_536
_DIGITS = 3
_PARTS = 256
_HELD = 1 << 22  # digests in memory
_COLUMNS = ("status", "reason", "sha256", "width", "height", "caption", "label", "image_size", "image_format")
_MEASURES = ("image_bytes", "width", "height", "caption_characters", "caption_words")


@dataclass(frozen=True)
class Spread:
    """Five numbers of a distribution; zeros for no values."""

    smallest: float
    p10: float
    median: float
    p90: float
    largest: float


@dataclass(frozen=True)
class Stats:
    """A set in numbers. rows = packed + the sums of `rejected` and `dropped`."""

    folder: Path
    name: str
    shards: int
    bytes: int
    rows: int
    packed: int
    rejected: Mapping[str, int]
    dropped: Mapping[str, int]  # by curation, with those that were erased
    noted: Mapping[str, int]
    formats: Mapping[str, int]
    image_bytes: Spread
    width: Spread
    height: Spread
    captions: int
    caption_characters: Spread
    caption_words: Spread
    labelled: int
    labels: Mapping[str, int]  # samples by class name, or by number where the set names no classes
    duplicate_images: int  # packed images whose bytes another one has


class Histogram:
    """Counts of whole numbers. Beyond 65,536 different ones they are kept to three digits; the smallest and the largest
    stay exact."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()
        self._smallest, self._largest, self._coarse = 0, 0, False

    def add(self, values: NDArray[Any]) -> None:
        """Counts `values`: whole numbers, not negative."""
        if values.size:
            found, counts = np.unique(values, return_counts=True)
            self._join(Counter(dict(zip(found.tolist(), counts.tolist(), strict=True))), int(found[0]), int(found[-1]))

    def merge(self, other: "Histogram") -> None:
        if other._counts:
            self._join(other._counts, other._smallest, other._largest)

    def spread(self) -> Spread:
        """Interpolates between neighbours, as numpy.percentile does."""
        if not self._counts:
            return Spread(0.0, 0.0, 0.0, 0.0, 0.0)
        values = np.array(sorted(self._counts), dtype=np.float64)
        ends = np.cumsum([self._counts[int(value)] for value in values])
        ranks = np.array([0.1, 0.5, 0.9]) * (ends[-1] - 1)
        below, above = (values[np.searchsorted(ends, side(ranks), "right")] for side in (np.floor, np.ceil))
        p10, median, p90 = (below + (above - below) * (ranks - np.floor(ranks))).tolist()
        return Spread(float(self._smallest), p10, median, p90, float(self._largest))

    def _join(self, counts: Counter[int], smallest: int, largest: int) -> None:
        self._smallest = min(self._smallest, smallest) if self._counts else smallest
        self._largest = max(self._largest, largest)
        self._counts.update(counts)
        if self._coarse or len(self._counts) > _EXACT_VALUES:
            self._coarse = True
            coarse: Counter[int] = Counter()
            for value, count in self._counts.items():
                step = 10 ** max(0, len(str(value)) - _DIGITS)
                coarse[value // step * step + step // 2] += count
            self._counts = coarse


class Repeats:
    """Counts digests that came before, by 64 bits of each. `with Repeats() as repeats: repeats.add(...)`."""

    def __init__(self) -> None:
        self._scope = ExitStack()
        self._folder = Path(self._scope.enter_context(tempfile.TemporaryDirectory(prefix="digests-")))
        self._held: list[NDArray[np.uint64]] = []
        self._count = 0

    def add(self, digests: NDArray[np.uint64]) -> None:
        self._held.append(digests)
        self._count += len(digests)
        if self._count > _HELD:
            self._flush()

    def count(self) -> int:
        """Counts what has been added more than once, the first time apart."""
        if not any(self._folder.iterdir()):
            held = np.concatenate(self._held) if self._held else np.zeros(0, np.uint64)
            return len(held) - len(np.unique(held))
        self._flush()
        repeated = 0
        for path in self._folder.iterdir():
            part = np.fromfile(path, np.uint64)
            repeated += len(part) - len(np.unique(part))
        return repeated

    def _flush(self) -> None:
        if not self._held:
            return
        held = np.sort(np.concatenate(self._held))
        bounds = np.searchsorted(held, np.arange(1, _PARTS, dtype=np.uint64) << np.uint64(56))
        for number, part in enumerate(np.split(held, bounds)):
            if part.size:
                with open(self._folder / f"{number:02x}", "ab") as file:
                    part.tofile(file)
        self._held, self._count = [], 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._scope.close()


@dataclass
class _Counts:
    """What one shard, or many, add up to."""

    rows: int = 0
    packed: int = 0
    captions: int = 0
    reasons: dict[str, Counter[str]] = field(default_factory=dict)  # by the field of `Stats`
    formats: Counter[str] = field(default_factory=Counter)
    labels: Counter[int] = field(default_factory=Counter)
    measures: dict[str, Histogram] = field(default_factory=lambda: {name: Histogram() for name in _MEASURES})

    def join(self, other: "_Counts") -> None:
        self.rows, self.packed = self.rows + other.rows, self.packed + other.packed
        self.captions += other.captions
        for name, counts in other.reasons.items():
            self.reasons.setdefault(name, Counter()).update(counts)
        self.formats.update(other.formats)
        self.labels.update(other.labels)
        for name, histogram in other.measures.items():
            self.measures[name].merge(histogram)


def stats(
    folder: Path,
    *,
    index_folder: Path | None = None,
    workers: int | None = 1,
    progress: ProgressCallback | None = None,
) -> Stats:
    """Counts samples, sizes, caption lengths and labels from the sidecars alone; foreign shards are indexed first.

    workers: processes; None takes one a core. Raises BadDataError for a sidecar that cannot be read.
    """
    found = open_set(folder, index_folder)
    total = _Counts()
    paths = [found.sidecar_path(entry) for entry in found.shards]
    with Repeats() as repeats:
        each = partial(ordered_map, workers=min(available() if workers is None else workers, len(paths)), chunk=1)
        for done, (counts, digests) in enumerate(each(_counted, paths)):
            total.join(counts)
            repeats.add(digests)
            if progress is not None:
                progress(done + 1, len(paths))
        duplicates = repeats.count()
    names = dict(enumerate(found.classes or ()))
    spreads = {name: histogram.spread() for name, histogram in total.measures.items()}
    return Stats(
        folder=found.folder,
        name=found.name,
        shards=len(found.shards),
        bytes=sum(entry.bytes for entry in found.shards),
        rows=total.rows,
        packed=total.packed,
        rejected=_by_frequency(total.reasons.get("rejected", Counter())),
        dropped=_by_frequency(total.reasons.get("dropped", Counter())),
        noted=_by_frequency(total.reasons.get("noted", Counter())),
        formats=_by_frequency(total.formats),
        image_bytes=spreads["image_bytes"],
        width=spreads["width"],
        height=spreads["height"],
        caption_characters=spreads["caption_characters"],
        caption_words=spreads["caption_words"],
        captions=total.captions,
        labelled=sum(total.labels.values()),
        labels={names.get(label, str(label)): count for label, count in sorted(total.labels.items())},
        duplicate_images=duplicates,
    )


def note_counts(rows: pa.Table) -> dict[str, int]:
    """Counts what packed samples lack, by reason, most frequent first."""
    return _by_frequency(Counter(reason for reason in packed_rows(rows)["reason"].to_pylist() if reason))


def _counted(sidecar: Path) -> tuple[_Counts, NDArray[np.uint64]]:
    """Counts one shard; returns 64 bits of each packed image's digest, too."""
    rows = read_sidecar(sidecar, _COLUMNS)
    packed = packed_rows(rows)
    captions = packed["caption"].drop_null()
    counts = _Counts(rows.num_rows, packed.num_rows, len(captions))
    counts.reasons = {
        "rejected": Counter(count_reasons(rows)),
        "dropped": Counter(count_reasons(rows, DROPPED, ERASED)),
        "noted": Counter(note_counts(rows)),
    }
    counts.formats.update(packed["image_format"].to_pylist())
    counts.labels.update(packed["label"].drop_null().to_pylist())
    for name, column in (("image_bytes", "image_size"), ("width", "width"), ("height", "height")):
        counts.measures[name].add(packed[column].drop_null().to_numpy())
    counts.measures["caption_characters"].add(pc.utf8_length(captions).to_numpy())
    counts.measures["caption_words"].add(np.array([len(text.split()) for text in captions.to_pylist()], np.int64))
    prefixes = [int(digest[:16], 16) for digest in packed["sha256"].drop_null().to_pylist()]
    return counts, np.array(prefixes, np.uint64)


def _by_frequency(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

"""Results of a shard under way, on disk: memory holds places alone, and a killed run takes up what it had fetched.

    .00012.spill    records of one row each, in the order of arrival; gone once the shard is whole
    record          length of the fields, length of the image, CRC-32 of the fields | fields as JSON | image

The fields have the SHA-256 of the image. A record that a kill cut off, or that a power cut spoiled, ends the file: what
stands before it counts.
"""

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.preparation.packing.samples import Sample

_HEAD = struct.Struct("<IIQ")
_FIELDS = ("reason", "extension", "format", "width", "height", "sha256", "pdq", "fields")  # the row knows the others


class _Place(NamedTuple):
    offset: int
    size: int
    fields: dict[str, Any]
    packed: bool


class Spill:
    """The results of one shard by row number. `fresh` begins anew; else what an earlier run left is found again."""

    def __init__(self, path: Path, *, fresh: bool) -> None:
        self._path = path
        self._places: dict[int, _Place] = {}
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | (os.O_TRUNC if fresh else 0), 0o644)
        self._end = self._recover()

    def __contains__(self, row: int) -> bool:
        return row in self._places

    def is_packed(self, row: int) -> bool:
        return self._places[row].packed

    def add(self, sample: Sample) -> None:
        """Writes a result. Raises OSError where the disk is full."""
        image = sample.image or b""
        known = {name: getattr(sample, name) for name in _FIELDS}
        packed = sample.image is not None
        fields = json.dumps({"row": sample.row, **known, "packed": packed}).encode()
        head = _HEAD.pack(len(fields), len(image), zlib.crc32(fields))
        if self._file < 0:
            raise ValueError(f"{self._path} is closed")
        begin = self._end + len(head) + len(fields)
        if os.pwritev(self._file, [head, fields, image], self._end) < begin + len(image) - self._end:
            raise OSError(28, "No space left on device", str(self._path))
        self._places[sample.row] = _Place(begin, len(image), known, packed)
        self._end = begin + len(image)

    def result(self, sample: Sample) -> Sample:
        """Completes a row's sample with its result, image and all."""
        place = self._places[sample.row]
        image = os.pread(self._file, place.size, place.offset) if place.packed else None
        return replace(sample, image=image, **place.fields)

    def results(self, samples: Iterator[Sample]) -> Iterator[Sample]:
        """Completes the rows one after the other."""
        return (self.result(sample) for sample in samples)

    def close(self, *, done: bool) -> None:
        """Closes the file, and deletes it where the shard is done."""
        file, self._file = self._file, -1  # whoever comes late must not write to another file of this number
        os.close(file)
        if done:
            with suppress(FileNotFoundError):
                self._path.unlink()

    def _recover(self) -> int:
        size, position = os.fstat(self._file).st_size, 0
        while position + _HEAD.size <= size:
            fields_size, image_size, checksum = _HEAD.unpack(os.pread(self._file, _HEAD.size, position))
            begin = position + _HEAD.size
            if fields_size == 0 or begin + fields_size + image_size > size:
                break
            content = os.pread(self._file, fields_size, begin)
            begin += fields_size
            if zlib.crc32(content) != checksum:
                break
            fields = json.loads(content)
            row, packed = fields.pop("row"), fields.pop("packed")
            if packed and hashlib.sha256(os.pread(self._file, image_size, begin)).hexdigest() != fields["sha256"]:
                break
            self._places[row] = _Place(begin, image_size, fields, packed)
            position = begin + image_size
        os.ftruncate(self._file, position)
        return position

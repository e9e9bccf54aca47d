"""Reads a JPEG marker by marker, without decoding: whether every decoder will go through it to its end.

    SOI | tables | SOF | tables | SOS, entropy-coded data | ... (progressive: more scans) | EOI, and nothing behind

A decoder gives a JPEG up for what its markers say (a table that is missing or can be no Huffman code, a frame that is
read by nobody), or because the file ends early. Wrong bits between the markers only spoil pixels: libjpeg warns, and
no reader can tell them from a poor picture. So the markers find what decoding finds, in a twentieth of its time.

Source: ITU-T T.81, Annexes B (markers), C (Huffman codes) and G (progressive); what libjpeg-turbo takes for an error.
"""

from bisect import bisect_left
from collections.abc import Iterator
from functools import lru_cache

import numpy as np

_SOI, _EOI = b"\xff\xd8", b"\xff\xd9"
_BASELINE, _EXTENDED, _PROGRESSIVE, _DHT, _DQT, _DRI, _SOS = 0xC0, 0xC1, 0xC2, 0xC4, 0xDB, 0xDD, 0xDA
_FRAMES = (_BASELINE, _EXTENDED, _PROGRESSIVE)
_PASSED_OVER = frozenset((*range(0xE0, 0xF0), 0xFE))  # APPn, COM
_MOST_BLOCKS = 10  # of one minimum coded unit: T.81, B.2.3
_MOST_SCANS = 24  # encoders write up to 12
_MOST_SHIFT = 13  # libjpeg's bound on a progressive scan's point transform


def is_sound_jpeg(data: bytes) -> bool:
    """Tells whether a JPEG is of a common kind (sequential in one scan, or progressive; Huffman; 8 bits; grey or three
    colours) and whole.

    False says nothing bad of it, only that it has to be decoded to be sure.
    """
    if not (data.startswith(_SOI) and data.endswith(_EOI)):
        return False
    frame: _Frame | None = None
    quantisers: frozenset[int] | None = frozenset()
    codes: frozenset[int] | None = frozenset()
    scans = 0
    for marker, content in _segments(data):
        if marker == _DQT:
            quantisers = _joined(quantisers, _quantisers(content))
        elif marker == _DHT:
            codes = _joined(codes, _huffman_codes(content))
        elif marker in _FRAMES and frame is None:
            frame = _read_frame(marker == _PROGRESSIVE, content)
        elif marker == _SOS and frame is not None and quantisers is not None and codes is not None:
            scans += 1
            if not frame.can_read(content, quantisers, codes) or scans > (_MOST_SCANS if frame.progressive else 1):
                return False
        elif marker == -1:
            return scans > 0
        elif marker != _DRI or len(content) != 2:
            return False
        if quantisers is None or codes is None:
            return False
    return False


def _segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yields marker and content of what decoding depends on; last -1 where EOI follows, and ends without where a marker
    is damaged."""
    position, stops = 2, None
    while position < len(data) - 2:
        marker, size = data[position + 1], int.from_bytes(data[position + 2 : position + 4], "big")
        if data[position] != 0xFF or size < 2:
            return
        if marker not in _PASSED_OVER:
            yield marker, data[position + 4 : position + 2 + size]
        position += 2 + size
        if marker == _SOS:
            if stops is None:
                stops, first = _stops(data, position), position
            after = bisect_left(stops, position - first)
            if after == len(stops):
                return
            position = first + stops[after]
    if position == len(data) - 2:
        yield -1, b""


def _stops(data: bytes, start: int) -> list[int]:
    """Lists where, counted from `start`, entropy-coded data could end: FF before what is neither a stuffed zero nor a
    restart marker."""
    found = np.frombuffer(data, dtype=np.uint8, offset=min(start, len(data)))
    marks = np.flatnonzero(found[:-1] == 0xFF)
    codes = found[marks + 1]
    stops: list[int] = marks[(codes != 0) & (codes & 0xF8 != 0xD0)].tolist()
    return stops


class _Frame:
    """A frame header. parts: identifier and quantiser of each component."""

    def __init__(self, progressive: bool, parts: list[bytes]) -> None:
        self.progressive = progressive
        self._quantisers = {part[0]: part[2] for part in parts}
        self._blocks = {part[0]: (part[1] >> 4) * (part[1] & 15) for part in parts}

    def can_read(self, scan: bytes, quantisers: frozenset[int], codes: frozenset[int]) -> bool:
        """Tells whether a scan header fits the frame and has every table that it names (T.81, B.2.3 and G.1.1)."""
        count = scan[0] if scan else 0
        if not 1 <= count <= len(self._quantisers) or len(scan) != 4 + 2 * count:
            return False
        named, tables = scan[1:-3:2], scan[2:-3:2]
        if [*named] != [name for name in self._quantisers if name in named]:
            return False
        if count > 1 and sum(self._blocks[name] for name in named) > _MOST_BLOCKS:
            return False
        if any(self._quantisers[name] not in quantisers for name in named):
            return False
        first, last, high, low = scan[-3], scan[-2], scan[-1] >> 4, scan[-1] & 15
        steady = all(one >> 4 in codes for one in tables)  # codes of DC coefficients
        varying = all((one & 15) + 16 in codes for one in tables)  # and of AC
        if not self.progressive:
            return count == len(self._quantisers) and scan[-3:] == b"\0\x3f\0" and steady and varying
        if low > _MOST_SHIFT or (high and low != high - 1):
            return False
        return (last == 0 and (high > 0 or steady)) if first == 0 else (first <= last <= 63 and count == 1 and varying)


def _read_frame(progressive: bool, content: bytes) -> _Frame | None:
    """Reads a frame header (T.81, B.2.2); None for one that is damaged or of no common kind."""
    count = content[5] if len(content) > 5 else 0
    if count not in (1, 3) or len(content) != 6 + 3 * count or content[0] != 8:
        return None
    parts = [content[6 + 3 * n : 9 + 3 * n] for n in range(count)]
    across, down = ([part[1] >> shift & 15 for part in parts] for shift in (4, 0))
    whole = all(1 <= one <= 4 and max(sampled) % one == 0 for sampled in (across, down) for one in sampled)
    sized = b"\0\0" not in (content[1:3], content[3:5])
    return _Frame(progressive, parts) if whole and sized and len({part[0] for part in parts}) == count else None


def _joined(known: frozenset[int] | None, found: frozenset[int] | None) -> frozenset[int] | None:
    return None if known is None or found is None else known | found


@lru_cache(maxsize=64)  # the pictures of an encoder share their tables
def _quantisers(content: bytes) -> frozenset[int] | None:
    """Returns the numbers of the tables that a segment defines, None where it is damaged (T.81, B.2.4.1)."""
    found: set[int] = set()
    position = 0
    while position < len(content):
        bits, number = divmod(content[position], 16)
        position += 1 + 64 * (1 + bits)
        if bits > 1 or number > 3 or position > len(content):
            return None
        found.add(number)
    return frozenset(found)


@lru_cache(maxsize=64)
def _huffman_codes(content: bytes) -> frozenset[int] | None:
    """Returns the numbers of the codes that a segment defines, those for AC coefficients plus 16; None where it is
    damaged or its lengths are those of no prefix code (T.81, B.2.4.2 and C.2)."""
    found: set[int] = set()
    position = 0
    while position < len(content):
        kind, number = divmod(content[position], 16)
        lengths = content[position + 1 : position + 17]
        symbols = content[position + 17 : position + 17 + sum(lengths)]
        position += 17 + sum(lengths)
        if kind > 1 or number > 3 or position > len(content) or not 0 < len(symbols) <= 256 or not _is_prefix(lengths):
            return None
        if kind == 0 and max(symbols) > 15:
            return None
        found.add(number + 16 * kind)
    return frozenset(found)


def _is_prefix(lengths: bytes) -> bool:
    """Tells whether a prefix code has so many words of 1, 2, ... 16 bits; the word of ones alone must stay free."""
    free = 1
    for count in lengths:
        free = 2 * free - count
        if free < (1 if count else 0):
            return False
    return True

"""Tar headers: a byte-stable ustar encoder, and a walk over any archive that names the damage it meets.

    header (512 bytes) | data, padded to 512 | header | data | ... | at least two zero blocks

`tarfile` reads 13 thousand samples a second and ends a cut or corrupt archive without a word; this walk looks at the
headers alone (POSIX.1-1988 ustar, POSIX.1-2001 pax, GNU long names, V7) and goes on behind a damaged one.
"""

from collections.abc import Iterator
from mmap import mmap
from typing import NamedTuple

BLOCK_BYTES = 512
END = bytes(2 * BLOCK_BYTES)
_MAX_OCTAL_SIZE = 8**11 - 1
_LENGTH_DIGITS = 20  # of a pax record's length, and the blank behind it
_NO_BLOCK = bytes(BLOCK_BYTES)
# The fields of a regular member's header behind its name, its size and its checksum: all but these are the same always.
_OWNERS, _TIME, _KIND = (
    b"0000644\0" + 2 * b"0000000\0",
    b"00000000000\0",
    (b"0" + bytes(100) + b"ustar\x0000").ljust(356, b"\0"),
)
_FIXED_SUM = sum(_OWNERS + _TIME + _KIND) + 8 * 32  # the checksum counts itself as blanks

# Reasons of damage, as they stand in the sidecar.
CORRUPT_HEADER = "corrupt_header"  # checksum or a field is wrong; what the header stood for is lost
TRUNCATED_HEADER = "truncated_header"  # the file ends inside a header
TRUNCATED_MEMBER = "truncated_member"  # the file ends inside a member's data
MISSING_END = "missing_end"  # the file ends behind a whole member, without the end-of-archive blocks
DATA_AFTER_END = "data_after_end"  # members behind an end-of-archive mark (appended archives, or a zeroed stretch)


class TarMember(NamedTuple):
    """A member's name and where its data lies. `kind` is the type flag: b"0" regular, b"5" folder, b"1" b"2" links."""

    name: str
    offset: int
    size: int
    kind: bytes


class Damage(NamedTuple):
    """What is wrong at byte `offset`; `name` is the member hit, where its header could still be read."""

    reason: str
    offset: int
    name: str = ""


def encode_header(name: str, size: int) -> bytes:
    """Encodes a regular member's 512-byte header: mode 0644, owner 0, mtime 0, so that equal content is equal bytes.

    Raises ValueError for a name that ustar cannot hold (not ASCII, over 100 bytes) or a size of 8 GiB and more.
    """
    if not name or not name.isascii() or len(name) > 100 or "\0" in name:
        raise ValueError(f"member name {name!r}: ustar holds 1 to 100 ASCII characters")
    if not 0 <= size <= _MAX_OCTAL_SIZE:
        raise ValueError(f"member {name}: {size} bytes do not fit ustar's 8 GiB")
    named, sized = name.encode("ascii"), b"%011o\0" % size
    checksum = b"%06o\0 " % (_FIXED_SUM + sum(named) + sum(sized))
    return named.ljust(100, b"\0") + _OWNERS + sized + _TIME + checksum + _KIND


def sample_name(name: str) -> tuple[str, str]:
    """Splits a member's name as WebDataset does: the sample's key, with its folders, and the extension."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return (folder + slash + stem).encode("utf-8", "replace").decode(), extension.lower()


def padding(size: int) -> bytes:
    """Returns the zero bytes that bring `size` to a whole number of blocks."""
    return bytes(-size % BLOCK_BYTES)


def walk(buffer: bytes | mmap) -> Iterator[TarMember | Damage]:
    """Yields every member of the archive in `buffer` in file order, and every damage at its place."""
    position, length = 0, len(buffer)
    overrides: dict[str, str] = {}  # from pax and GNU headers, for the next member
    while position < length:
        block = bytes(buffer[position : position + BLOCK_BYTES])
        if len(block) < BLOCK_BYTES:
            if block.strip(b"\0"):
                yield Damage(TRUNCATED_HEADER, position)
                return
            break
        if block == _NO_BLOCK:
            position = _after_zeros(buffer, position)
            if position >= length:
                return
            yield Damage(DATA_AFTER_END, position)
            continue
        parsed = _parse(block)
        if parsed is None:
            yield Damage(CORRUPT_HEADER, position)
            overrides = {}
            position = _next_header(buffer, position + BLOCK_BYTES)
            continue
        name, size, kind = parsed
        try:
            size = int(overrides.get("size", size))
        except ValueError:
            size = -1
        name = overrides.get("path", name)
        data = position + BLOCK_BYTES
        if kind in b"12346":  # links and devices have no data, whatever the size field says
            size = 0
        if size < 0:
            yield Damage(CORRUPT_HEADER, position, name)
            overrides = {}
            position = _next_header(buffer, data)
            continue
        if data + size > length:
            yield Damage(TRUNCATED_MEMBER, position, "" if kind in b"xgXLK" else name)
            return
        position = data + size + (-size % BLOCK_BYTES)
        if kind in b"xX":
            records = _pax_records(bytes(buffer[data : data + size]))
            if records is None:
                yield Damage(CORRUPT_HEADER, data - BLOCK_BYTES)
                records = {}
            overrides |= records
        elif kind == b"L":
            overrides["path"] = bytes(buffer[data : data + size]).rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif kind in b"gK":
            pass  # global records and long link targets name no member
        else:
            if "GNU.sparse.major" in overrides or "GNU.sparse.map" in overrides:
                kind = b"S"
            overrides = {}
            yield TarMember(name, data, size, kind)
    yield Damage(MISSING_END, length)


def _parse(block: bytes) -> tuple[str, int, bytes] | None:
    """Returns name, size and type flag of a header, None where its checksum or its numbers are wrong."""
    try:
        expected = _number(block[148:156])
        size = _number(block[124:136])
    except ValueError:
        return None
    # The checksum is the sum of the bytes with its own field as blanks; some old writers summed signed bytes.
    total = sum(block) - sum(block[148:156]) + 8 * 32
    if total != expected and total - 256 * sum(byte > 127 for byte in block[:148] + block[156:]) != expected:
        return None
    name = block[:100].split(b"\0", 1)[0]
    kind = block[156:157]
    if kind == b"\0" or kind == b"7":
        kind = b"5" if kind == b"\0" and name.endswith(b"/") else b"0"
    if block[257:263] == b"ustar\0" and kind not in b"LK":  # GNU's own format ("ustar  ") uses this field otherwise
        prefix = block[345:500].split(b"\0", 1)[0]
        if prefix:
            name = prefix + b"/" + name
    return name.decode("utf-8", "surrogateescape"), size, kind


def _number(field: bytes) -> int:
    """Reads an octal field, or GNU's base-256 form of numbers too large for octal."""
    if field[0] in (0x80, 0xFF):
        value = int.from_bytes(field[1:], "big")
        return value - (256 ** (len(field) - 1) if field[0] == 0xFF else 0)
    return int(field.split(b"\0", 1)[0].strip() or b"0", 8)


def _pax_records(data: bytes) -> dict[str, str] | None:
    """Reads `LENGTH KEY=VALUE\\n` records; None where their lengths do not add up."""
    records: dict[str, str] = {}
    data = data.rstrip(b"\0")
    position = 0
    while position < len(data):
        blank = data.find(b" ", position, position + _LENGTH_DIGITS)
        digits = data[position:blank] if blank >= 0 else b""
        if not digits.isdigit():
            return None
        end = position + int(digits)
        record = data[blank + 1 : end]
        key, equals, value = record[:-1].partition(b"=")
        if not blank + 1 < end <= len(data) or not equals or not record.endswith(b"\n"):
            return None
        records[key.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        position = end
    return records


def _after_zeros(buffer: bytes | mmap, position: int) -> int:
    """Finds the first block at or behind `position` that holds anything but zeros; the length if none does."""
    step = 64 * BLOCK_BYTES
    zeros = bytes(step)
    while position < len(buffer):
        chunk = bytes(buffer[position : position + step])
        if chunk != zeros[: len(chunk)]:
            filled = next(i for i, byte in enumerate(chunk) if byte)
            return position + filled // BLOCK_BYTES * BLOCK_BYTES
        position += step
    return len(buffer)


def _next_header(buffer: bytes | mmap, position: int) -> int:
    """Finds the first sound ustar header at or behind `position`; the end of the file if there is none."""
    while (magic := buffer.find(b"ustar", position + 257)) >= 0:
        position = magic - 257
        if position % BLOCK_BYTES == 0 and _parse(bytes(buffer[position : position + BLOCK_BYTES])) is not None:
            return position
        position += 1
    # Nothing is left but, perhaps, the end mark; walk() must not read the lost member's data as headers.
    mark = len(buffer) - len(END)
    return mark if mark >= 0 and bytes(buffer[mark:]) == END else len(buffer)

"""The header walk against `tarfile`, on sound archives of every dialect and on all the ways to break one."""

import io
import tarfile
import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.format import ustar
from data_pipeline.format.ustar import Damage, TarMember

DIALECTS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def split(data: bytes) -> tuple[list[TarMember], list[Damage]]:
    events = list(ustar.walk(data))
    return [e for e in events if isinstance(e, TarMember)], [e for e in events if isinstance(e, Damage)]


def by_tarfile(data: bytes) -> list[tuple[str, int, int]]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return [(m.name, m.offset_data, m.size) for m in tar.getmembers()]


def test_header_is_the_one_that_tarfile_writes() -> None:
    for name, size in [("000000000.jpg", 0), ("a/b.txt", 511), ("x" * 100, 8**11 - 1)]:
        info = tarfile.TarInfo(name)
        info.size = size
        assert ustar.encode_header(name, size) == info.tobuf(tarfile.USTAR_FORMAT)


@pytest.mark.parametrize(("name", "size"), [("", 1), ("x" * 101, 1), ("ä", 1), ("a\0b", 1), ("a", 8**11), ("a", -1)])
def test_header_refuses_what_ustar_cannot_hold(name: str, size: int) -> None:
    with pytest.raises(ValueError):
        ustar.encode_header(name, size)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_walk_finds_what_tarfile_finds(dialect: str, make_archive: Callable[..., bytes]) -> None:
    long = {"f" * 200 + ".jpg": b"1" * 700, "ordner/ü" + "n" * 300 + ".txt": b"2"} if dialect != "ustar" else {}
    deep = {"d" * 90 + "/" + "e" * 60 + ".jpg": b"3" * 512}
    data = make_archive({"a.jpg": b"x" * 513, "a.txt": b"", **deep, **long, "z.json": b"{}"}, DIALECTS[dialect], 1.25)
    found, damage = split(data)
    assert damage == []
    assert [(m.name, m.offset, m.size) for m in found] == by_tarfile(data)
    assert len(found) == 4 + len(long)


def test_walk_knows_folders_and_links(make_archive: Callable[..., bytes]) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, kind in [("folder", tarfile.DIRTYPE), ("s.jpg", tarfile.SYMTYPE), ("h.jpg", tarfile.LNKTYPE)]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.jpg" if kind != tarfile.DIRTYPE else ""
            tar.addfile(info)
        info = tarfile.TarInfo("a.jpg")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    found, damage = split(buffer.getvalue())
    assert [m.kind for m in found] == [b"5", b"2", b"1", b"0"] and damage == []
    assert buffer.getvalue()[found[-1].offset :][:3] == b"abc"


@settings(max_examples=60, deadline=None)
@given(
    files=st.dictionaries(
        st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0/"), min_size=1, max_size=150),
        st.binary(max_size=1500),
        max_size=6,
    ),
    dialect=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    mtime=st.sampled_from([0, 1_700_000_000, 1747969211.5140378]),
)
def test_walk_agrees_with_tarfile_on_any_names_and_contents(
    files: dict[str, bytes], dialect: int, mtime: float
) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=dialect) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), mtime
            tar.addfile(info, io.BytesIO(content))
    data = buffer.getvalue()
    found, damage = split(data)
    assert damage == []
    assert [(m.offset, m.size) for m in found] == [(offset, size) for _, offset, size in by_tarfile(data)]
    assert [data[m.offset : m.offset + m.size] for m in found] == list(files.values())
    assert [m.name for m in found] == list(files)


def test_an_archive_cut_anywhere_gives_whole_members_only_and_says_that_it_is_cut(
    three: dict[str, bytes], make_archive: Callable[..., bytes]
) -> None:
    data = make_archive(three)
    whole, _ = split(data)
    last = whole[-1].offset + whole[-1].size
    end = last + (-last) % 512
    for cut in range(0, len(data), 7):
        found, damage = split(data[:cut])
        assert found == whole[: len(found)]
        assert all(m.offset + m.size <= cut for m in found)
        assert len(found) == sum(m.offset + m.size <= cut for m in whole)
        if cut < end + 512:
            assert len(damage) == 1
            assert damage[0].reason in (ustar.TRUNCATED_HEADER, ustar.TRUNCATED_MEMBER, ustar.MISSING_END)
        else:
            assert damage == []


def test_any_byte_of_a_header_changed_is_noticed_and_costs_that_member_alone(
    three: dict[str, bytes], make_archive: Callable[..., bytes], find_header: Callable[[bytes, str], int]
) -> None:
    data = make_archive(three)
    whole, _ = split(data)
    start = find_header(data, "001.txt")
    for at in set(range(512)) - {155}:  # the blank behind the checksum's digits, which nobody reads
        broken = bytearray(data)
        broken[start + at] ^= 0x15
        found, damage = split(bytes(broken))
        others = [m for m in whole if m.name != "001.txt"]
        assert [d.reason for d in damage] == [ustar.CORRUPT_HEADER], at
        assert damage[0].offset == start and found == others, at


def test_data_that_looks_like_nothing_is_one_damage(make_archive: Callable[..., bytes]) -> None:
    for data in (b"\xff" * 5000, b"hello", bytes(range(256)) * 8):
        found, damage = split(data)
        assert found == [] and damage[0].reason in (ustar.CORRUPT_HEADER, ustar.TRUNCATED_HEADER)


def test_a_zeroed_stretch_and_an_appended_archive_are_data_after_the_end(
    three: dict[str, bytes], make_archive: Callable[..., bytes], find_header: Callable[[bytes, str], int]
) -> None:
    data = make_archive(three)
    start = find_header(data, "001.jpg")
    found, damage = split(data[:start] + bytes(512) + data[start + 512 :])
    assert damage[0].reason == ustar.DATA_AFTER_END
    assert {m.name for m in found} == set(three) - {"001.jpg"}
    found, damage = split(data + make_archive({"late.jpg": b"x"}))
    assert [d.reason for d in damage] == [ustar.DATA_AFTER_END]
    assert [m.name for m in found] == [*three, "late.jpg"]


def test_a_broken_pax_record_is_damage_and_does_not_rename_the_member(make_archive: Callable[..., bytes]) -> None:
    data = bytearray(make_archive({"a.jpg": b"x"}, tarfile.PAX_FORMAT, 0.5))
    at = data.index(b" mtime=")
    data[at - 2 : at] = b"99"
    found, damage = split(bytes(data))
    assert [d.reason for d in damage] == [ustar.CORRUPT_HEADER] and [m.name for m in found] == ["a.jpg"]


def test_old_dialects_are_read() -> None:
    seventh = bytearray(ustar.encode_header("old.jpg", 3))
    seventh[257:265] = bytes(8)  # V7: no magic, type flag NUL
    seventh[156:157] = b"\0"
    seventh[148:156] = b"        "
    seventh[148:156] = b"%06o\0 " % sum(seventh)
    assert split(bytes(seventh) + b"abc" + bytes(509) + ustar.END) == ([TarMember("old.jpg", 512, 3, b"0")], [])
    large = bytearray(ustar.encode_header("large.bin", 0))
    large[124:136] = b"\x80" + (3).to_bytes(11, "big")  # GNU's base-256 size
    large[148:156] = b"        "
    large[148:156] = b"%06o\0 " % sum(large)
    assert split(bytes(large) + b"abc" + bytes(509) + ustar.END) == ([TarMember("large.bin", 512, 3, b"0")], [])


@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=3000), at=st.integers(0, 12))
def test_no_bytes_make_the_walk_raise_or_point_outside(data: bytes, at: int) -> None:
    base = bytearray(
        ustar.encode_header("a.jpg", 600) + bytes(1024) + ustar.encode_header("b.jpg", 5) + bytes(512) + ustar.END
    )
    base[at * 256 : at * 256 + len(data)] = data
    for event in ustar.walk(bytes(base)):
        if isinstance(event, TarMember):
            assert event.offset >= 512 and event.offset + event.size <= len(base)


def test_a_pax_header_of_a_megabyte_takes_no_time(make_archive: Callable[..., bytes]) -> None:
    records = b"".join(b"30 comment=%018d\n" % n for n in range(100_000))
    body = records + b"16 path=big.jpg\n"
    header = bytearray(ustar.encode_header("PaxHeader", len(body)))
    header[156:157] = b"x"
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    data = bytes(header) + body + ustar.padding(len(body)) + make_archive({"a.jpg": b"1"})
    started = time.process_time()
    found, damage = split(data)
    assert damage == [] and [member.name for member in found] == ["big.jpg"]
    assert time.process_time() - started < 5  # 0.1 s; the quadratic form took ten seconds a megabyte

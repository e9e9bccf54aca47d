"""Tables, tars, sidecars and image headers with random damage: no crash, no hang, no memory beyond a bound; and the
rows that the damage did not touch are still there."""

import gzip
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import simplejpeg
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.errors import BadDataError, UserError
from data_pipeline.format import ShardWriter, index_shard, read_sidecar, ustar, write_sidecar
from data_pipeline.format.image_header import is_image, read_image_header
from data_pipeline.format.jpeg_markers import is_sound_jpeg
from data_pipeline.preparation import ImageRules, TableFormat
from data_pipeline.preparation.packing.images import prepare
from data_pipeline.preparation.packing.rules import Prepared, Refused
from data_pipeline.preparation.sources.columns import Columns
from data_pipeline.preparation.sources.opening import open_urls
from data_pipeline.reading.decode.pixels import BadSample, decode, read_header
from data_pipeline.reading.storage.columns import read_columns

BOUND = 200_000_000  # bytes by which the process may grow, for an input of a few kilobytes
# 5 subjects of 100 examples each and more: 500 in all. No deadline an example: the machine may be busy; the file's
# time-out ends a hang.
MANY = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)

mutations = st.lists(
    st.tuples(
        st.sampled_from(["flip", "set", "insert", "delete", "repeat", "cut", "swap"]),
        st.floats(0, 1, exclude_max=True),
        st.integers(0, 255),
        st.integers(1, 64),
    ),
    min_size=1,
    max_size=8,
)


def mutated(data: bytes, steps: list[tuple[str, float, int, int]]) -> bytes:
    for what, where, value, length in steps:
        at = int(where * (len(data) + 1))
        piece = data[at : at + length]
        if what == "flip":
            data = data[:at] + bytes(byte ^ (1 << value % 8) for byte in piece) + data[at + length :]
        elif what == "set":
            data = data[:at] + bytes([value]) * len(piece) + data[at + length :]
        elif what == "insert":
            data = data[:at] + bytes([value]) * length + data[at:]
        elif what == "delete":
            data = data[:at] + data[at + length :]
        elif what == "repeat":
            data = data[:at] + piece * (1 + value % 20) + data[at:]
        elif what == "cut":
            data = data[:at]
        else:
            data = data[at:] + data[:at]
    return data


@contextmanager
def bounded() -> Iterator[None]:
    """Fails where the process grew by more than BOUND. (tracemalloc would crash with pyarrow's threads: gh-128679.)"""
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = peak()
    yield
    assert peak() - before < BOUND


def peak() -> int:
    """Most bytes that this process has had in memory."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def tables() -> dict[str, bytes]:
    rows = [(f"http://h/{n}.jpg?a=b,c", f'caption {n}, with "quotes" and 猫', str(n % 3), "0.5") for n in range(40)]
    names = ("url", "caption", "label", "similarity")
    quoted = ["".join(f'"{cell.replace(chr(34), chr(34) * 2)}",' for cell in row)[:-1] for row in rows]
    columns = {name: [row[number] for row in rows] for number, name in enumerate(names)}
    columns["tags"] = [["a", "b"]] * len(rows)
    parquet = io.BytesIO()
    pq.write_table(pa.table(columns), parquet)
    return {
        "csv": "\r\n".join([",".join(names), *quoted, ""]).encode(),
        "tsv": "\n".join("\t".join(row) for row in [names, *rows]).encode(),
        "jsonl": "\n".join(json.dumps(dict(zip(names, row, strict=True))) for row in rows).encode(),
        "txt": "\n".join(row[0] for row in rows).encode(),
        "csv.gz": gzip.compress("\n".join([",".join(names), *quoted]).encode()),
        "parquet": parquet.getvalue(),
    }


TABLES = tables()


@MANY
@given(kind=st.sampled_from(sorted(TABLES)), steps=mutations)
def test_mutated_tables_give_rows_or_an_error_that_says_why(kind: str, steps: list, tmp_path: Path) -> None:
    path = tmp_path / f"t.{kind}"
    path.write_bytes(mutated(TABLES[kind], steps))
    with bounded():
        try:
            source = open_urls(str(path), Columns(), TableFormat())
            rows = list(source.rows())
        except UserError as error:  # BadDataError, too
            assert str(path) in str(error) or "part" in str(error)
            return
        assert [row.number for row in rows] == list(range(len(rows))) and source.count() == len(rows)
        assert all(row.reason or row.caption is None or isinstance(row.caption, str) for row in rows)
        for row in rows:
            for text in (row.caption, row.url):
                assert row.reason or text is None or "\0" not in text.encode().decode()


@pytest.mark.parametrize("line", range(1, 40, 13))
@pytest.mark.parametrize("kind", ["tsv", "jsonl", "txt"])
def test_damage_in_one_line_moves_no_other_row(kind: str, line: int, tmp_path: Path) -> None:
    lines = TABLES[kind].split(b"\n")
    sound = list(_rows(tmp_path, kind, b"\n".join(lines)))
    for damage in (b'"', b"\t", b"\xff", b"{", b"\0", b'""", "'):
        damaged = list(_rows(tmp_path, kind, b"\n".join([*lines[:line], lines[line] + damage, *lines[line + 1 :]])))
        hit = line - (kind == "tsv")
        assert [row for row in damaged if row.number != hit] == [row for row in sound if row.number != hit]
        assert len(damaged) == len(sound)


def _rows(folder: Path, kind: str, data: bytes) -> Iterator:
    (folder / f"t.{kind}").write_bytes(data)
    return open_urls(str(folder / f"t.{kind}"), Columns(), TableFormat()).rows()


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shard") / "00000.tar"
    rng = np.random.default_rng(0)
    with ShardWriter(path) as writer:
        for number in range(6):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (8, 9, 3), np.uint8)).save(file, "JPEG")
            fields = {"caption": f"c {number}", "label": number, "url": "http://h"}
            members = {"jpg": file.getvalue(), "txt": f"c {number}".encode(), "json": json.dumps(fields).encode()}
            writer.add(f"{number:09d}", members | ({"cls": b"3"} if number % 2 else {}))
    return path


@MANY
@given(steps=mutations)
def test_mutated_tars_are_indexed_to_the_end(steps: list, shard: Path, tmp_path: Path) -> None:
    data = mutated(shard.read_bytes(), steps)
    path = tmp_path / "00000.tar"
    path.write_bytes(data)
    with bounded():
        events = list(ustar.walk(data))
        found = index_shard(path)
        assert len(events) <= len(data) // ustar.BLOCK_BYTES + 2
    for row in found.to_pylist():
        if row["status"] == "packed":
            assert 0 <= row["image_offset"] <= row["image_offset"] + row["image_size"] <= len(data)
            assert is_image(data[row["image_offset"] : row["image_offset"] + 64])


@MANY
@given(steps=mutations)
def test_mutated_sidecars_are_read_or_refused(steps: list, shard: Path, tmp_path: Path) -> None:
    path = tmp_path / "00000.parquet"
    write_sidecar(path, index_shard(shard))
    path.write_bytes(mutated(path.read_bytes(), steps))
    with bounded():
        try:
            read_sidecar(path)
        except BadDataError as error:
            assert str(path) in str(error)
        try:
            columns = read_columns(path, ())
        except Exception as error:  # what OpenShard takes for "sidecar_unreadable"
            assert not isinstance(error, MemoryError)
            return
        for row in range(len(columns)):
            columns.place("image", row)


def test_columns_whose_names_are_no_text_are_refused(shard: Path, tmp_path: Path) -> None:
    path = tmp_path / "00000.parquet"
    write_sidecar(path, index_shard(shard))
    path.write_bytes(path.read_bytes().replace(b"caption", b"capt\xf3on"))
    with pytest.raises(BadDataError, match=r"00000\.parquet cannot be read"):
        read_sidecar(path)
    with pytest.raises(BadDataError, match=r"00000\.parquet cannot be read"):
        open_urls(str(path), Columns(), TableFormat())


def pictures() -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (24, 33, 3), np.uint8))
    exif = Image.Exif()
    exif[274] = 6
    found = {}
    options: dict[str, dict] = {
        "jpeg": {"exif": exif}, "progressive": {"progressive": True}, "png": {"exif": exif}, "webp": {"exif": exif},
        "gif": {}, "bmp": {}, "tiff": {"exif": exif}, "avif": {},
    }  # fmt: skip
    for name, given_options in options.items():
        file = io.BytesIO()
        image.save(file, "jpeg" if name == "progressive" else name, **given_options)
        found[name] = file.getvalue()
    return found


PICTURES = pictures()


@settings(parent=MANY, max_examples=100)
@given(kind=st.sampled_from(sorted(PICTURES)), steps=mutations, head=st.booleans())
def test_mutated_images_are_prepared_or_refused(kind: str, steps: list, head: bool) -> None:
    data = PICTURES[kind]
    data = mutated(data[:200], steps) + data[200:] if head else mutated(data, steps)
    rules = ImageRules(shorter_side=16, max_pixels=1_000_000)
    with bounded():
        read_image_header(data)
        found = prepare(data, rules)
        try:
            pixels = decode(data, read_header(data, 1_000_000))
        except BadSample:
            pixels = None
    assert isinstance(found, Prepared | Refused)
    if isinstance(found, Prepared):
        opened = Image.open(io.BytesIO(found.data))
        assert opened.size == (found.width, found.height) and min(opened.size) <= 16
    assert pixels is None or pixels.size <= 3_000_000


@settings(parent=MANY, max_examples=150)
@given(kind=st.sampled_from(["jpeg", "progressive", "grey"]), steps=mutations, head=st.booleans())
def test_a_jpeg_is_kept_by_its_markers_where_decoding_keeps_it(kind: str, steps: list, head: bool) -> None:
    """The oracle decodes: simplejpeg, and Pillow where simplejpeg finds a fault."""
    data = JPEGS[kind]
    inner = mutated(data[2:700], steps) + data[700:-2] if head else mutated(data[2:-2], steps)
    data = data[:2] + inner + data[-2:]
    if not is_sound_jpeg(data):
        return
    try:
        simplejpeg.decode_jpeg(data, "GRAY")
    except ValueError:
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
            image.load()
            assert image.mode in ("RGB", "L")


def jpegs() -> dict[str, bytes]:
    image = Image.fromarray(np.random.default_rng(1).integers(0, 255, (40, 56, 3), np.uint8))
    found = {}
    for name, given_options in {"jpeg": {"subsampling": 2}, "progressive": {"progressive": True}, "grey": {}}.items():
        file = io.BytesIO()
        (image.convert("L") if name == "grey" else image).save(file, "jpeg", restart_marker_blocks=4, **given_options)
        found[name] = file.getvalue()
    return found


JPEGS = jpegs()


def test_common_jpegs_are_sound_and_other_ones_are_decoded() -> None:
    assert all(map(is_sound_jpeg, JPEGS.values()))
    whole = JPEGS["progressive"]
    cmyk = io.BytesIO()
    Image.new("CMYK", (16, 16)).save(cmyk, "jpeg")
    second_scan = whole.index(b"\xff\xda", whole.index(b"\xff\xda") + 2)
    unsure = [
        whole[:-2],
        whole + b"\0",
        whole[:second_scan],
        b"\xff\xd8\xff\xd9",
        cmyk.getvalue(),
    ]
    assert not any(map(is_sound_jpeg, unsure))

"""Tables as the world writes them: every row is there, in its place, with its own cells; or its reason is."""

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.errors import BadDataError, UserError
from data_pipeline.preparation.sources.columns import Columns, TableFormat
from data_pipeline.preparation.sources.files import table_kind
from data_pipeline.preparation.sources.opening import open_urls
from data_pipeline.preparation.sources.rows import Row


def read(path: Path | str, columns: Columns | None = None, **format: object) -> list[Row]:
    source = open_urls(str(path), columns or Columns(), TableFormat(**format))
    found = list(source.rows())
    assert source.count() == len(found) and [row.number for row in found] == list(range(len(found)))
    labels = source.labels()
    assert labels is None or len(list(labels)) == len(found)
    return found


def captions(rows: list[Row]) -> list[str | None]:
    return [row.caption or row.reason for row in rows]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str | bytes], Path]:
    def written(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return written


def test_a_quote_in_a_tsv_is_a_character(write: Callable) -> None:
    path = write("t.tsv", 'url\tcaption\nu0\t"open\nu1\t5" pipe\nu2\t"a" or "b"\nu3\t"\nu4\tlast\n')
    assert captions(read(path)) == ['"open', '5" pipe', '"a" or "b"', '"', "last"]
    as_written_by_pandas = write("p.tsv", 'url\tcaption\nu0\t"say ""x"""\nu1\t"two\nlines"\n')
    assert captions(read(as_written_by_pandas, quoting="csv")) == ['say "x"', "two\nlines"]


@pytest.mark.parametrize(
    "rows", ['u1,"open\nu2,fine\nu3,"x"\nu4,y\n', 'u1,"open\nu2,fine\nu3,y\n', 'u1,"a"\nu2,"b\nu3,"c"d\n']
)
def test_an_open_quote_in_a_csv_is_an_error_with_its_line(rows: str, write: Callable) -> None:
    line = 2 + [row.count('"') % 2 for row in rows.splitlines()].index(1)
    with pytest.raises(BadDataError, match=rf"t\.csv, line {line}: a quote is opened"):
        read(write("t.csv", "url,caption\n" + rows))


def test_rows_with_other_cells_than_the_header_are_rejected_in_place(write: Callable) -> None:
    path = write("t.csv", 'url,caption,nsfw\nu0,a,x\nu1,b\nu2,"c"d,x\nu3,d,x,more\n\nu4,"e,\ne",x\nu5,f,x')
    assert captions(read(path)) == ["a", "wrong_cell_count", "bad_quotes", "wrong_cell_count", "e,\ne", "f"]
    assert captions(read(write("t.tsv", "url\tcaption\nu0\ta\tb\nu1\n\nu2\tc\n"))) == [
        "wrong_cell_count",
        "wrong_cell_count",
        "c",
    ]


@pytest.mark.parametrize("header", ["url,caption,caption", "url,url,caption", " url,caption,url"])
def test_a_column_named_twice_is_an_error(header: str, write: Callable) -> None:
    with pytest.raises(UserError, match="twice"):
        read(write("t.csv", f"{header}\na,b,c\n"))


def test_two_columns_that_look_alike_must_be_told_apart(write: Callable) -> None:
    path = write("t.csv", "URL,url,caption\na,b,c\n")
    with pytest.raises(UserError, match="both look like the url"):
        read(path)
    assert read(path, Columns(url="URL"))[0].url == "a"
    with pytest.raises(UserError, match="twice"):
        pq.write_table(pa.table([["a"], ["b"]], names=["url", "url"]), path.with_suffix(".parquet"))
        read(path.with_suffix(".parquet"))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252", "utf-16-le", "shift_jis"])
def test_encodings_are_found_by_their_mark_or_given(encoding: str, write: Callable) -> None:
    text = "猫" if encoding == "shift_jis" else "café"
    path = write("t.csv", f"url,caption\r\nu0,{text}\r\nu1,b\r\n".encode(encoding))
    given = {} if encoding in ("utf-8", "utf-8-sig", "utf-16") else {"encoding": encoding}
    assert captions(read(path, **given)) == [text, "b"]


def test_what_is_not_the_encoding_rejects_its_row_alone_or_says_so(write: Callable) -> None:
    assert captions(read(write("t.csv", b"url,caption\nu0,caf\xe9\nu1,b\n"))) == ["text_not_utf8", "b"]
    assert captions(read(write("t.tsv", b"url\tcaption\nu\xff\ta\nu1\tb\0c\nu2\td\n"))) == [
        "text_not_utf8",
        "text_has_nul",
        "d",
    ]
    with pytest.raises(UserError, match="UTF-16"):
        read(write("u.csv", "url,caption\na,b\n".encode("utf-16-le")))
    with pytest.raises(BadDataError, match="is not utf-16"):
        read(write("v.csv", "url,caption\na,b\n".encode("utf-16")[:-1]))
    with pytest.raises(UserError, match="encoding 'klingon'"):
        TableFormat(encoding="klingon")


@pytest.mark.parametrize(("delimiter", "name"), [(";", "t.csv"), ("|", "t.csv"), ("\t", "t.csv"), (",", "t.tsv")])
def test_another_delimiter_is_guessed_and_said(delimiter: str, name: str, write: Callable) -> None:
    path = write(name, f"url{delimiter} caption\na{delimiter}b\n")
    source = open_urls(str(path), Columns(), TableFormat())
    assert "guessed" in source.describe() and source.identity()["read as"]["guessed"]
    assert next(source.rows()).url == "a"
    assert "guessed" not in open_urls(str(path), Columns(), TableFormat(delimiter=delimiter)).describe()


def test_line_ends_of_every_kind_and_a_blank_before_a_name(write: Callable) -> None:
    for end in ("\n", "\r\n", "\r"):
        for name, sign in (("t.csv", ","), ("t.tsv", "\t")):
            path = write(name, f"url{sign} caption{end}a{sign} b {end}c{sign}d")
            assert captions(read(path)) == ["b", "d"], (end, name)
    assert captions(read(write("t.tsv", "url\tcaption\na\tx\ry\nb\tz\u2028w\x85v\n"))) == ["x\ry", "z\u2028w\x85v"]


def test_a_list_without_a_header_loses_no_row(write: Callable) -> None:
    lines = "http://a/0.jpg\tfirst\nhttp://a/1.jpg\tsecond\n"
    path = write("cc12m.tsv", lines)
    for url_column in (None, "http://a/0.jpg"):
        with pytest.raises(UserError, match=r"no header.*--columns url,caption"):
            read(path, Columns(url=url_column))
    for format in ({"names": ("url", "caption")}, {"preset": "cc12m"}):
        assert captions(read(path, **format)) == ["first", "second"]
    swapped = write("cc3m.tsv", "first\thttp://a/0.jpg\nsecond\thttp://a/1.jpg\n")
    assert [row.url for row in read(swapped, preset="cc3m")] == ["http://a/0.jpg", "http://a/1.jpg"]
    assert captions(read(write("t.csv", "1,u,a\n2,v,b\n"), names=("_", "url", "caption"))) == ["a", "b"]


def test_yfcc_is_read_by_its_layout(write: Callable) -> None:
    cells = [str(n) for n in range(25)]
    cells[9], cells[16], cells[17] = "A+red%2Dgreen+bird", "http://f/1.jpg", "CC BY"
    found = read(
        write("yfcc100m_dataset.tsv", "\t".join(cells) + "\n"), Columns(caption="description"), preset="yfcc100m"
    )
    assert (found[0].caption, found[0].url) == ("A red-green bird", "http://f/1.jpg")
    assert found[0].further["licence"] == "CC BY"


@pytest.mark.parametrize("ending", ["", ".gz", ".zst", ".bz2"])
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "txt"])
def test_compressed_tables_are_read_as_plain_ones(kind: str, ending: str, write: Callable) -> None:
    content = {
        "csv": "url,caption\nu0,a\nu1,b\n",
        "tsv": "url\tcaption\nu0\ta\nu1\tb\n",
        "jsonl": '{"url": "u0", "caption": "a"}\n{"url": "u1", "caption": "b"}\n',
        "txt": "u0\nu1\n",
    }[kind].encode()
    codec = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}.get(ending)
    data = (
        gzip.compress(content)
        if codec == "gzip"
        else pa.compress(content, codec, asbytes=True)
        if codec == "zstd"
        else content
    )
    if codec == "bz2":
        import bz2

        data = bz2.compress(content)
    path = write(f"t.{kind}{ending}", data)
    assert table_kind(path) == kind
    assert [row.url for row in read(path)] == ["u0", "u1"]
    if codec is not None:
        with pytest.raises(BadDataError, match="cannot be read"):
            read(write(f"cut.{kind}{ending}", data[: len(data) - 9]))


def test_jsonl_rows_that_are_no_objects_are_rejected_in_place(write: Callable) -> None:
    lines = ['{"url": "u0", "caption": ["a", "b"], "similarity": 0.3}', "[1]", "{", '{"url": "u3", "tags": {"x": 1}}']
    found = read(write("t.jsonl", "\n".join(lines)))
    assert captions(found) == ["a", "bad_json", "bad_json", ""]
    assert found[0].further == {"similarity": "0.3", "tags": None} and found[3].further["tags"] == '{"x": 1}'
    joined = read(write("t.jsonl", "\n".join(lines)), captions="join")
    assert joined[0].caption == "a b"


def test_a_folder_of_parts_is_one_table_in_the_order_of_names(tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    (folder / "deep").mkdir(parents=True)
    for n, name in enumerate(["part-0.parquet", "part-1.parquet", "deep/part-9.parquet"]):
        table = pa.table(
            {
                "URL": [f"u{n}a", f"u{n}b"],
                "TEXT": ["x", None],
                "SAMPLE_ID": pa.array([1, 2], [pa.int32(), pa.int64(), pa.int32()][n]),
            }
        )
        pq.write_table(table, folder / name)
    (folder / "_SUCCESS").write_text("")
    (folder / "._part-0.parquet").write_bytes(b"mac")
    found = read(folder)
    assert [row.url for row in found] == ["u2a", "u2b", "u0a", "u0b", "u1a", "u1b"]
    assert open_urls(str(folder), Columns(), TableFormat()).further.field("SAMPLE_ID").type == pa.int64()
    pq.write_table(pa.table({"URL": ["u"]}), folder / "part-2.parquet")
    with pytest.raises(UserError, match="do not all have the column 'SAMPLE_ID'"):
        read(folder)
    (folder / "part-2.parquet").rename(folder / "part-2.csv")
    with pytest.raises(UserError, match="several kinds"):
        read(folder)


def test_text_parts_with_other_columns_are_an_error(write: Callable) -> None:
    write("parts/0.csv", "url,caption\nu0,a\n")
    folder = write("parts/1.csv", "caption,url\nb,u1\n").parent
    with pytest.raises(UserError, match=r"1\.csv has the columns caption, url"):
        read(folder)


def test_tables_behind_urls_are_read(write: Callable) -> None:
    content = "url,caption\nu0,a\nu1,b\n"
    with fsspec.open("memory://tables/t.csv.gz", "wb") as file:
        file.write(gzip.compress(content.encode()))
    with fsspec.open("memory://tables/parts/0.parquet", "wb") as file:
        pq.write_table(pa.table({"url": ["u0"], "caption": ["a"]}), file)
    assert captions(read("memory://tables/t.csv.gz")) == ["a", "b"]
    assert captions(read("memory://tables/parts")) == ["a"]
    assert captions(read(f"file://{write('t.csv', content)}")) == ["a", "b"]
    with pytest.raises(UserError, match="does not exist"):
        read("memory://tables/none.csv")


@pytest.mark.parametrize(("rule", "expected"), [("first", "a"), ("join", "a b")])
def test_captions_that_are_lists_or_structs_follow_the_rule(rule: str, expected: str, tmp_path: Path) -> None:
    cells = {
        "list": [["a", "b"], [], None],
        "struct": [{"x": "a", "y": "b"}, {"x": None, "y": None}, None],
        "structs": [[{"id": 1, "caption": "a"}, {"id": 2, "caption": "b"}], [], None],
    }
    for kind, values in cells.items():
        pq.write_table(pa.table({"url": list("uvw"), "caption": values}), tmp_path / f"{kind}.parquet")
        found = read(tmp_path / f"{kind}.parquet", captions=rule)
        assert [row.caption for row in found] == [expected, None, None], kind
        assert found[0].further["input_caption"] == values[0]  # the others are not lost


def test_a_random_caption_is_the_same_in_every_run(tmp_path: Path) -> None:
    pq.write_table(pa.table({"url": ["u"] * 200, "caption": [["a", "b", "c"]] * 200}), tmp_path / "t.parquet")
    first, second = (captions(read(tmp_path / "t.parquet", captions="random")) for _ in range(2))
    assert first == second and all(40 < first.count(one) < 95 for one in "abc")


def test_nan_is_no_caption_and_long_ones_are_rejected(tmp_path: Path) -> None:
    table = pa.table({"url": ["u", "v"], "caption": [float("nan"), 2.5]})
    pq.write_table(table, tmp_path / "t.parquet")
    assert [row.caption for row in read(tmp_path / "t.parquet")] == [None, "2.5"]
    pq.write_table(pa.table({"url": ["u", "v"], "caption": ["x" * 11, "é" * 10]}), tmp_path / "t.parquet")
    assert captions(read(tmp_path / "t.parquet", max_caption=10)) == ["caption_too_long", "é" * 10]


def test_further_columns_are_kept_and_clashes_get_their_own_name(tmp_path: Path) -> None:
    table = pa.table(
        {
            "URL": ["u0", "u1"], "TEXT": ["a", "b"], "width": [640, 10**12], "similarity": [0.25, float("nan")],
            "NSFW": pa.array(["UNLIKELY", None]).dictionary_encode(), "sha256": ["a" * 64, None],
            "vector": [[1.0], None], "thumbnail": [b"\xff\xd8", None],
        }
    )  # fmt: skip
    pq.write_table(table, tmp_path / "t.parquet")
    source = open_urls(str(tmp_path / "t.parquet"), Columns(), TableFormat())
    rows = list(source.rows())
    assert rows[0].further == {
        "input_width": 640, "similarity": 0.25, "NSFW": "UNLIKELY", "input_sha256": "a" * 64, "vector": [1.0]
    }  # fmt: skip
    assert (rows[0].expected, rows[1].expected) == ("a" * 64, None)
    assert "not kept: thumbnail" in source.describe() and source.further.field("NSFW").type == pa.string()
    only = open_urls(str(tmp_path / "t.parquet"), Columns(hash="none"), TableFormat(keep=("NSFW",)))
    assert only.further.names == ["NSFW"] and next(only.rows()).expected is None
    with pytest.raises(UserError, match="no column 'nope' to keep"):
        open_urls(str(tmp_path / "t.parquet"), Columns(), TableFormat(keep=("nope",)))


def test_parquet_text_that_is_no_utf8_rejects_its_row_alone(tmp_path: Path) -> None:
    raw = pa.array([b"fine", b"caf\xe9", b"too"], pa.binary())
    table = pa.table(
        {"url": pa.array(["u", "v", "w"]), "caption": pa.Array.from_buffers(pa.string(), 3, raw.buffers())}
    )
    pq.write_table(table, tmp_path / "t.parquet")
    assert captions(read(tmp_path / "t.parquet")) == ["fine", "text_not_utf8", "too"]


def test_a_malformed_digest_rejects_its_row(write: Callable) -> None:
    found = read(write("t.csv", f"url,md5\nu0,{'A' * 32}\nu1,xyz\nu2,\n"))
    assert [(row.expected, row.reason) for row in found] == [
        ("a" * 32, ""),
        (None, "expected_hash_invalid"),
        (None, ""),
    ]


def test_a_row_of_a_gigantic_line_is_an_error_not_a_gigabyte(write: Callable) -> None:
    with pytest.raises(BadDataError, match="line 2"):
        read(write("t.tsv", "url\tcaption\n" + "x" * (1 << 24) + "y\n"))


def test_python_writes_what_is_read(write: Callable, tmp_path: Path) -> None:
    nasty = ["a,b", 'say "x"', "two\nlines", "tab\there", "  blank ", "\\back", ";semi", "naïve 猫 🦊", "'single'"]
    with open(tmp_path / "t.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("url", "caption"), *((f"u{n}", text) for n, text in enumerate(nasty))])
    assert captions(read(tmp_path / "t.csv")) == [text.strip() for text in nasty]
    lines = "".join(json.dumps({"url": f"u{n}", "caption": text}) + "\n" for n, text in enumerate(nasty))
    assert captions(read(write("t.jsonl", lines))) == [text.strip() for text in nasty]

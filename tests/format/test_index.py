"""What index_shard says of shards that somebody else made, whole and damaged."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.errors import UserError
from data_pipeline.format import count_reasons, index_shard, packed_rows
from data_pipeline.format.sidecar import SIDECAR_SCHEMA

Files = dict[str, bytes]
SAMPLE = Path(__file__).parents[2].parent / "shared" / "data" / "cc12m-sample.tar"


def rows(path: Path) -> dict[str, dict]:
    """Rows by key; rows of the shard itself under ""."""
    table = index_shard(path)
    assert table.schema == SIDECAR_SCHEMA
    assert table["row"].to_pylist() == list(range(table.num_rows))
    return {row["key"]: row for row in table.to_pylist()}


def told(path: Path) -> dict[str, tuple[str, str]]:
    return {key: (row["status"], row["reason"]) for key, row in rows(path).items()}


def test_a_sound_shard_gives_one_row_a_sample_with_places_that_hold_what_they_say(
    three: Files, pack_shard: Callable[..., Path]
) -> None:
    path = pack_shard(three)
    data = path.read_bytes()
    found = rows(path)
    assert list(found) == ["000", "001", "002"]
    for key, row in found.items():
        image = data[row["image_offset"] :][: row["image_size"]]
        assert image == three[f"{key}.jpg"] and hashlib.sha256(image).hexdigest() == row["sha256"]
        assert data[row["text_offset"] :][: row["text_size"]] == three[f"{key}.txt"]
        assert data[row["json_offset"] :][: row["json_size"]] == three[f"{key}.json"]
        assert (row["status"], row["reason"], row["image_format"]) == ("packed", "", "jpeg")
        assert (row["width"], row["height"], row["caption"]) == (8, 6, f"picture {int(key)}")
        assert row["url"] == f"https://example.org/{int(key)}.jpg"


def test_members_of_a_sample_may_lie_apart_and_other_members_do_no_harm(
    three: Files, pack_shard: Callable[..., Path]
) -> None:
    apart = dict(sorted(three.items(), key=lambda item: item[0][::-1]))
    extra = {"000.npy": b"x", "__meta__.json": b"{}", "README": b"hello", "deep/er/._000.jpg": b"mac"}
    assert told(pack_shard(apart | extra)) == {key: ("packed", "") for key in ("000", "001", "002")}


def test_labels_come_from_json_or_cls(make_picture: Callable[..., bytes], pack_shard: Callable[..., Path]) -> None:
    files = {
        "a.jpg": make_picture(0),
        "a.cls": b"7",
        "b.png": make_picture(1, "PNG"),
        "b.json": json.dumps({"label": 3}).encode(),
        "c.webp": make_picture(2, "WEBP"),
        "c.cls": b"cat",
        "d.jpg": make_picture(3),
        "d.json": json.dumps({"label": True, "caption": 7, "url": []}).encode(),
    }
    found = rows(pack_shard(files))
    assert [row["label"] for row in found.values()] == [7, 3, None, None]
    assert [row["image_format"] for row in found.values()] == ["jpeg", "png", "webp", "jpeg"]
    assert [row["reason"] for row in found.values()] == ["", "", "label_invalid", "label_invalid"]
    assert all(row["caption"] is None for row in found.values())  # no text is missed here


def test_format_is_told_by_content_not_by_name(
    make_picture: Callable[..., bytes], pack_shard: Callable[..., Path]
) -> None:
    assert rows(pack_shard({"a.jpg": make_picture(0, "PNG")}))["a"]["image_format"] == "png"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"001.jpg": b""}, ("rejected", "image_empty")),
        ({"001.jpg": b"<html>404</html>"}, ("rejected", "not_an_image")),
        ({"001.jpg": None}, ("rejected", "image_missing")),
        ({"001.txt": None, "001.json": None}, ("packed", "text_missing")),
        ({"001.txt": b" \n"}, ("packed", "text_empty")),
        ({"001.txt": b"caf\xe9"}, ("packed", "text_not_utf8")),
        ({"001.json": b'{"url": '}, ("packed", "bad_json")),
        ({"001.json": b"[" * 100_000}, ("packed", "bad_json")),
    ],
)
def test_each_fault_of_a_sample_has_its_reason_and_touches_no_other(
    changes: dict[str, bytes | None],
    expected: tuple[str, str],
    three: Files,
    pack_shard: Callable[..., Path],
) -> None:
    changed = {name: changes.get(name, data) for name, data in three.items()}
    found = told(pack_shard({name: data for name, data in changed.items() if data is not None}))
    assert found == {"000": ("packed", ""), "001": expected, "002": ("packed", "")}


def test_of_two_samples_with_one_key_the_first_stays(
    three: Files,
    pack_shard: Callable[..., Path],
    make_archive: Callable[..., bytes],
    make_members: Callable[[int], Files],
) -> None:
    again = {name.replace("005", "001"): data for name, data in make_members(5).items()}
    one, other = make_archive(three), make_archive(again)
    body = one[: max(i for i in range(0, len(one), 512) if one[i : i + 512].strip(b"\0")) + 512]
    table = index_shard(pack_shard(body + other))
    assert [(row["key"], row["status"], row["reason"]) for row in table.to_pylist()] == [
        ("000", "packed", ""),
        ("001", "packed", ""),
        ("002", "packed", ""),
        ("001", "rejected", "duplicate_key"),
    ]
    assert table["caption"].to_pylist()[1] == "picture 1"


def test_a_link_is_no_image(pack_shard: Callable[..., Path], make_archive: Callable[..., bytes]) -> None:
    import io
    import tarfile

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        link = tarfile.TarInfo("a.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    assert told(pack_shard(buffer.getvalue()))["a"] == ("rejected", "not_a_file")


@pytest.mark.parametrize(
    ("member", "expected"),
    [
        ("001.jpg", {"001": ("rejected", "corrupt_header")}),  # the sample lost its image to the header
        ("001.txt", {"001": ("packed", ""), "": ("rejected", "corrupt_header")}),  # the caption stands in the JSON too
        ("002.json", {"002": ("packed", ""), "": ("rejected", "corrupt_header")}),
    ],
)
def test_a_corrupt_header_costs_its_member_and_is_recorded(
    member: str,
    expected: dict[str, tuple[str, str]],
    three: Files,
    pack_shard: Callable[..., Path],
    make_archive: Callable[..., bytes],
    find_header: Callable[[bytes, str], int],
) -> None:
    data = bytearray(make_archive(three))
    data[find_header(bytes(data), member) + 130] ^= 0xFF
    found = told(pack_shard(bytes(data)))
    assert found == {"000": ("packed", ""), "001": ("packed", ""), "002": ("packed", "")} | expected


def test_a_cut_shard_keeps_its_whole_samples_and_says_what_was_cut(
    three: Files,
    pack_shard: Callable[..., Path],
    make_archive: Callable[..., bytes],
    find_header: Callable[[bytes, str], int],
) -> None:
    data = make_archive({name: body for name, body in three.items() if not name.endswith(".json")})
    image, text = find_header(data, "002.jpg"), find_header(data, "002.txt")
    whole = {"000": ("packed", ""), "001": ("packed", "")}
    assert told(pack_shard(data[: image + 600])) == whole | {"002": ("rejected", "truncated_member")}
    assert told(pack_shard(data[: image + 100])) == whole | {"": ("rejected", "truncated_header")}
    assert told(pack_shard(data[:image])) == whole | {"": ("rejected", "missing_end")}
    # The image is whole, its text is not: webdataset delivers such a sample without a word.
    for cut, reason in [(text, "missing_end"), (text + 9, "truncated_header"), (text + 515, "truncated_member")]:
        expected = whole | {"002": ("packed", "text_missing"), "": ("rejected", reason)}
        assert told(pack_shard(data[:cut])) == expected


@pytest.mark.parametrize("content", [b"", bytes(1024), bytes(10240)])
def test_an_empty_shard_says_so(content: bytes, pack_shard: Callable[..., Path]) -> None:
    assert count_reasons(index_shard(pack_shard(content))) == {"empty_shard": 1}


def test_what_is_no_tar_says_so(pack_shard: Callable[..., Path]) -> None:
    table = index_shard(pack_shard(b"PK\x03\x04" + bytes(range(256)) * 40))
    assert packed_rows(table).num_rows == 0
    assert count_reasons(table)["corrupt_header"] == 1 and count_reasons(table)["empty_shard"] == 1


def test_a_missing_or_unreadable_shard_is_the_users_error(tmp_path: Path) -> None:
    for path in (tmp_path / "none.tar", tmp_path):
        with pytest.raises(UserError, match=str(path)):
            index_shard(path)


@pytest.mark.skipif(not SAMPLE.exists(), reason=f"{SAMPLE} is not here")
def test_the_cc12m_sample_reads_as_tarfile_and_webdataset_read_it() -> None:
    import tarfile

    import webdataset

    table = index_shard(SAMPLE)
    assert table.num_rows == packed_rows(table).num_rows == 32 and set(table["reason"].to_pylist()) == {""}
    with tarfile.open(SAMPLE) as tar:
        for row in table.to_pylist():
            for part, extension in (("image", "jpg"), ("text", "txt"), ("json", "json")):
                member = tar.getmember(f"{row['key']}.{extension}")
                assert (member.offset_data, member.size) == (row[f"{part}_offset"], row[f"{part}_size"])
    samples = list(webdataset.WebDataset(str(SAMPLE), shardshuffle=False))
    assert [s["__key__"] for s in samples] == table["key"].to_pylist()
    assert [s["txt"].decode() for s in samples] == table["caption"].to_pylist()

"""14 kinds of damage, read by two real ranks: each recorded with its reason, no crash, no hang, ranks in step."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from reading_sets import picture, write_set

from data_pipeline.format import read_manifest

SIZES = [10, 10, 10]  # of every set; damage hits shard 00001.tar
BAD, WORSE, LACKING = "bad_sample", "damaged_shard", "incomplete_sample"


def foreign(folder: Path, change: Callable[[int, dict[str, bytes]], dict[str, bytes]]) -> None:
    """A set that somebody else made, without an index; `change` edits the members of the samples of shard 00001."""
    folder.mkdir()
    for shard, size in enumerate(SIZES):
        with tarfile.open(folder / f"{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
            for n in range(size):
                number = 10 * shard + n
                members = {f"{number:04d}.jpg": picture(number), f"{number:04d}.txt": f"picture {number}".encode()}
                for name, data in (change(n, members) if shard == 1 else members).items():
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))


def with_image(hit: int, data: bytes) -> Callable[[int, dict[str, bytes]], dict[str, bytes]]:
    return lambda n, members: members | {f"{10 + n:04d}.jpg": data} if n == hit else members


def bomb() -> bytes:
    data = bytearray(picture(1, kind="PNG"))
    data[16:24] = (60000).to_bytes(4, "big") * 2  # IHDR's width and height
    return bytes(data)


def cut_tar(folder: Path) -> None:
    write_set(folder, SIZES)
    with tarfile.open(folder / "00001.tar") as archive:
        middle = archive.getmember("000010005.jpg").offset_data + 100
    os.truncate(folder / "00001.tar", middle)


def corrupt_header(folder: Path) -> None:
    foreign(folder, lambda n, members: members)
    with tarfile.open(folder / "00001.tar") as archive:
        offset = archive.getmember("0013.jpg").offset
    with open(folder / "00001.tar", "r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * 300)


def replaced(folder: Path) -> None:
    """By a shard of other samples, of the same length."""
    write_set(folder, SIZES)
    target = folder / "00001.tar"
    length = target.stat().st_size
    shutil.copy(folder / "00002.tar", target)
    with open(target, "r+b") as file:
        file.truncate(length)


def out_of_date(folder: Path) -> None:
    """The shard was written again, with other samples, after the index was made."""
    write_set(folder, SIZES)
    other = write_set(folder.parent / "scratch", [3, 13], image=lambda n: picture(500 + n, size=(50, 50)))
    shutil.copy(other.folder / "00001.tar", folder / "00001.tar")
    shutil.rmtree(other.folder)


def missing(folder: Path) -> None:
    write_set(folder, SIZES)
    (folder / "00001.tar").unlink()


def unreadable(folder: Path) -> None:
    """Opening fails, though a name is there (permissions would not stop root)."""
    missing(folder)
    (folder / "00001.tar").symlink_to("00001.tar")


def unreadable_data(folder: Path) -> None:
    """Opening succeeds, reading fails."""
    missing(folder)
    (folder / "00001.tar").mkdir()


def damaged_bytes(folder: Path) -> None:
    manifest = write_set(folder, SIZES)
    with open(manifest.shard_path(manifest.shards[1]), "r+b") as file:
        file.seek(512 + 200)
        file.write(b"\0\1\2\3")


def no_sidecar(folder: Path) -> None:
    write_set(folder, SIZES)
    (folder / "00001.parquet").write_bytes(b"PAR1 no parquet file")


def empty_shard(folder: Path) -> None:
    foreign(folder, lambda n, members: members)
    (folder / "00001.tar").write_bytes(b"")


def duplicate_keys(folder: Path) -> None:
    foreign(folder, lambda n, members: {name.replace("0014", "0013"): data for name, data in members.items()})


# case -> how it is made, kind of event, reason, samples of shard 00001 that are hit
CASES: dict[str, tuple[Callable[[Path], None], str, str, int]] = {
    "cut_tar": (cut_tar, BAD, "shard_cut", 5),
    "corrupt_header": (corrupt_header, WORSE, "corrupt_header", 1),
    "zero_length_member": (lambda f: foreign(f, with_image(3, b"")), WORSE, "image_empty", 1),
    "missing_text": (
        lambda f: foreign(f, lambda n, m: {k: v for k, v in m.items() if k != "0013.txt"}), LACKING, "text_missing", 1,
    ),
    "truncated_jpeg": (lambda f: foreign(f, with_image(3, picture(13)[:-200])), BAD, "image_truncated", 1),
    "wrong_extension": (lambda f: foreign(f, with_image(3, b"<html>gone</html>")), WORSE, "not_an_image", 1),
    "bomb": (lambda f: foreign(f, with_image(3, bomb())), BAD, "too_many_pixels", 1),
    "duplicate_keys": (duplicate_keys, WORSE, "duplicate_key", 1),
    "shard_missing": (missing, BAD, "shard_missing", 10),
    "shard_replaced": (replaced, BAD, "shard_replaced", 10),
    "index_out_of_date": (out_of_date, BAD, "index_out_of_date", 10),
    "unreadable_file": (unreadable, BAD, "shard_unreadable", 10),
    "caption_not_utf8": (
        lambda f: foreign(f, lambda n, m: m | {"0013.txt": b"caf\xe9"} if n == 3 else m), LACKING, "text_not_utf8", 1,
    ),
    "empty_shard": (empty_shard, WORSE, "empty_shard", 1),
    "unreadable_data": (unreadable_data, BAD, "shard_unreadable", 10),
    "damaged_bytes": (damaged_bytes, BAD, "image_damaged", 1),
    "no_sidecar": (no_sidecar, BAD, "sidecar_unreadable", 10),
}  # fmt: skip


def png_named_jpg(folder: Path) -> None:
    foreign(folder, with_image(3, picture(13, kind="PNG")))


def all_text(folder: Path) -> None:
    foreign(
        folder,
        lambda n, members: {name: b"no image" if name.endswith("jpg") else data for name, data in members.items()},
    )


def few_truncated(folder: Path) -> None:
    """Three of the thirty."""
    foreign(folder, lambda n, m: with_image(n, picture(10 + n)[:-200])(n, m) if n in (2, 5, 8) else m)


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> list[dict]:
    """What the two ranks saw of every case."""
    folder = tmp_path_factory.mktemp("damage")
    for name, (make, *_) in CASES.items():
        make(folder / name)
    png_named_jpg(folder / "png_named_jpg")
    missing(folder / "limit_missing")
    few_truncated(folder / "limit_few")
    all_text(folder / "limit_text")
    command = [sys.executable, str(Path(__file__).with_name("damage_rank.py"))]
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([*command, str(rank), str(folder)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        for rank in ranks:
            _, errors = rank.communicate(timeout=400)
            assert rank.returncode == 0, errors[-3000:]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_damage_is_recorded_with_its_reason_and_ranks_stay_in_step(seen, case):
    _, kind, reason, hit = CASES[case]
    one, two = (rank[case] for rank in seen)
    assert one["error"] == two["error"] == ""
    assert one["steps"] == two["steps"] >= 3
    events = one["events"] + two["events"]
    assert {(event["kind"], event["reason"]) for event in events} == {(kind, reason)}
    assert {event["shard"] for event in events} == {"00001.tar"}
    samples = [tuple(sample) for sample in one["samples"] + two["samples"]]
    assert len(samples) == 16 * one["steps"]
    if kind == WORSE:  # found by indexing: recorded once, and not part of the order
        assert sum(event["samples"] for event in events) == hit
        return
    hits = Counter((event["shard"], event["row"]) for event in events)
    assert len(hits) == hit and min(hits.values()) >= 2  # in each epoch anew
    used = {(shard, key) for shard, key, _ in samples}
    for event in events:
        if kind == BAD:
            assert (event["replaced_by"]["shard"], event["replaced_by"]["key"]) in used
            assert ("00001.tar", event["key"]) not in used or event["key"] == ""
        else:
            assert ["00001.tar", event["key"], False] in one["samples"] + two["samples"]


def test_an_image_of_another_format_than_its_name_is_read_all_the_same(seen):
    assert not any(rank["png_named_jpg"]["events"] or rank["png_named_jpg"]["error"] for rank in seen)


@pytest.mark.parametrize("case", ["limit_missing", "limit_few", "limit_text"])
def test_above_the_allowed_rate_all_ranks_end_together_with_code_3_naming_the_shard(seen, case):
    for rank in seen:
        assert rank[case]["exit_code"] == 3
        assert "00001.tar: " in rank[case]["error"] and "max_bad_rate 0.01" in rank[case]["error"]
    assert seen[0][case]["steps"] == seen[1][case]["steps"] and seen[0][case]["error"] == seen[1][case]["error"]


def test_ranks_that_would_end_alone_would_not_end_together(seen):
    """What makes the case of few bad samples one: by its own counts, only one rank has too many at the end."""
    from data_pipeline.reading.faults import too_many

    bad = [len({event["position"] for event in rank["limit_few"]["events"]}) for rank in seen]
    steps = seen[0]["limit_few"]["steps"]
    assert not all(too_many(count, 8 * steps, 0.01) for count in bad)


def test_the_count_of_bad_samples_is_of_samples(tmp_path):
    """A shard in which none is left is noted as empty, too; that is no further sample."""
    from data_pipeline.errors import BadDataError
    from data_pipeline.reading import DataConfig, ImageText, Reader

    all_text(tmp_path / "set")
    settings = DataConfig(sources=[{"path": str(tmp_path / "set")}], image_size=32, workers=0)
    with pytest.raises(BadDataError, match=f": 10 of {sum(SIZES)} samples are damaged.*10 x not_an_image"):
        Reader(settings, ImageText(), batch_size=4)


def test_a_set_without_one_good_sample_says_so(tmp_path):
    from reading_sets import tokenize

    from data_pipeline.errors import BadDataError
    from data_pipeline.reading import DataConfig, ImageText, Reader

    manifest = write_set(tmp_path / "set", [6, 6])
    for shard in manifest.shards:
        manifest.shard_path(shard).unlink()
    settings = DataConfig(
        sources=[{"path": str(tmp_path / "set")}], image_size=32, context_length=8, workers=0, max_bad_rate=1
    )
    with (
        Reader(settings, ImageText(tokenize, 8), batch_size=4) as reader,
        pytest.raises(BadDataError, match="shard_missing"),
    ):
        next(reader.batches(0))
    assert read_manifest(tmp_path / "set").samples == 12

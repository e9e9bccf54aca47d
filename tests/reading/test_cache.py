"""The node's cache: whole checked copies, bounded, one fetch of a file whoever asks, nothing left by a crash."""

import hashlib
import io
import os
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pytest
from reading_sets import tokenize, write_set

from data_pipeline.errors import UserError
from data_pipeline.reading import DataConfig, ImageText, Reader
from data_pipeline.reading.storage.cache import FetchError, FileCache


@pytest.fixture
def remote(tmp_path: Path) -> Path:
    """Ten files of 1000 bytes."""
    folder = tmp_path / "remote"
    folder.mkdir()
    for number in range(10):
        (folder / f"{number}.tar").write_bytes(bytes([number]) * 1000)
    return folder


def read(cache: FileCache, url: str, **known) -> bytes:
    file = cache.open(url, **known)
    with os.fdopen(file, "rb") as opened:
        return opened.read()


def copies(cache: FileCache) -> set[str]:
    return {path.name.partition("-")[2] for path in cache.folder.iterdir() if not path.name.startswith(".")}


def test_a_file_is_fetched_once_and_read_from_its_copy(remote, tmp_path):
    cache = FileCache(tmp_path / "cache", 10_000)
    digest = hashlib.sha256(bytes([3]) * 1000).hexdigest()
    for _ in range(3):
        assert read(cache, f"file://{remote}/3.tar", sha256=digest, size=1000) == bytes([3]) * 1000
    assert cache.fetched == 1
    (remote / "3.tar").unlink()
    assert read(FileCache(tmp_path / "cache", 10_000), f"file://{remote}/3.tar", sha256=digest) == bytes([3]) * 1000


def test_the_least_recently_used_copy_goes_first(remote, tmp_path):
    cache = FileCache(tmp_path / "cache", 3000)
    for number in (0, 1, 2, 0, 3, 4):
        read(cache, f"file://{remote}/{number}.tar")
        time.sleep(0.01)
    assert copies(cache) == {"0.tar", "3.tar", "4.tar"}


def test_an_evicted_file_stays_readable_where_it_is_open(remote, tmp_path):
    cache = FileCache(tmp_path / "cache", 1000)
    first = cache.open(f"file://{remote}/0.tar")
    read(cache, f"file://{remote}/1.tar")
    assert copies(cache) == {"1.tar"}
    assert os.pread(first, 2000, 0) == bytes(1000)
    os.close(first)


def test_a_file_larger_than_the_cache_is_still_had(remote, tmp_path):
    assert read(FileCache(tmp_path / "cache", 10), f"file://{remote}/5.tar") == bytes([5]) * 1000


def test_another_digest_or_size_is_refused_and_leaves_no_copy(remote, tmp_path):
    cache = FileCache(tmp_path / "cache", 10_000, first_wait=0)
    for known in ({"sha256": "0" * 64}, {"size": 999}):
        with pytest.raises(FetchError) as caught:
            cache.open(f"file://{remote}/1.tar", **known)
        assert caught.value.reason == "shard_replaced"
    with pytest.raises(FetchError) as caught:
        cache.open(f"file://{remote}/none.tar")
    assert caught.value.reason == "shard_missing"
    assert copies(cache) == set() and not list(cache.folder.glob(".*.partial"))


def test_a_fetch_that_fails_is_tried_again(remote, tmp_path, monkeypatch):
    cache, failures = FileCache(tmp_path / "cache", 10_000, first_wait=0), [2]
    copy = FileCache._copy

    def flaky(self, url, target):
        if failures[0]:
            failures[0] -= 1
            target.write_bytes(b"half")
            raise ConnectionError("reset")
        return copy(self, url, target)

    monkeypatch.setattr(FileCache, "_copy", flaky)
    assert read(cache, f"file://{remote}/2.tar") == bytes([2]) * 1000
    failures[0] = 100
    with pytest.raises(FetchError, match="reset") as caught:
        cache.open(f"file://{remote}/7.tar")
    assert caught.value.reason == "shard_unreachable" and not list(cache.folder.glob(".*.partial"))


FETCH_ALL = """
import sys
from data_pipeline.reading.storage.cache import FileCache
cache = FileCache(sys.argv[2], int(sys.argv[3]))
import os
for round in range(20):
    for number in range(10):
        file = cache.open(f"file://{sys.argv[1]}/{number}.tar")
        assert os.pread(file, 2000, 0) == bytes([number]) * 1000
        os.close(file)
print(cache.fetched)
"""


@pytest.mark.parametrize(("size", "most"), [(10_000, 10), (4000, 800)])
def test_processes_share_the_cache_without_harm(remote, tmp_path, size, most):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = [sys.executable, "-c", FETCH_ALL, str(remote), str(tmp_path / "cache"), str(size)]
    started = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    fetched = [int(process.communicate(timeout=60)[0]) for process in started]
    assert 10 <= sum(fetched) <= most
    assert sum(path.stat().st_size for path in (tmp_path / "cache").iterdir() if path.suffix == ".tar") <= size


FETCH_SLOWLY = """
import sys, time
from data_pipeline.reading.storage.cache import FileCache
def slow(self, url, target):
    target.write_bytes(b"half")
    print("writing", flush=True)
    time.sleep(60)
FileCache._copy = slow
FileCache(sys.argv[2], 10_000).open(f"file://{sys.argv[1]}/4.tar")
"""


def test_a_process_killed_while_fetching_blocks_nobody_and_leaves_nothing(remote, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = [sys.executable, "-c", FETCH_SLOWLY, str(remote), str(tmp_path / "cache")]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    cache = FileCache(tmp_path / "cache", 10_000)
    assert cache.fetch(f"file://{remote}/4.tar", wait=False) is False  # somebody is at it
    process.kill()
    process.communicate()
    assert len(list(cache.folder.glob(".*.partial"))) == 1
    assert read(cache, f"file://{remote}/4.tar") == bytes([4]) * 1000
    assert not list(cache.folder.glob(".*.partial"))


def settings(path: str, **options) -> DataConfig:
    base = {"image_size": 32, "context_length": 8, "workers": 0, "prefetch": 2, "block_shards": 2}
    return DataConfig(sources=[{"path": path, "name": "set"}], **(base | options))


def drawn(config: DataConfig, steps: int = 6) -> list:
    events: list[dict] = []
    with Reader(config, ImageText(tokenize, 8), batch_size=8, seed=1, events=events.append) as reader:
        batches = reader.batches(0)
        found = [next(batches) for _ in range(steps)]
        batches.close()
    assert not events
    return [(batch.samples, batch.targets.captions, int(batch.views.long().sum())) for batch in found]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("protocol", ["memory", "file"])
def test_a_remote_set_reads_as_the_local_one(tmp_path, protocol, workers):
    write_set(tmp_path / "set", [6, 5, 7, 6])
    expected = drawn(settings(str(tmp_path / "set")))
    if protocol == "memory":
        url = "memory://bucket/set"
        fsspec.filesystem("memory").put(str(tmp_path / "set"), "/bucket/set", recursive=True)
    else:
        url = f"file://{tmp_path}/set"
    cache = {"folder": str(tmp_path / "cache"), "size_gb": 60e3 / 1e9}  # about three of the four shards
    assert drawn(settings(url, cache=cache, workers=workers)) == expected


def test_a_remote_set_without_an_index_gets_one_once(tmp_path):
    write_set(tmp_path / "set", [6, 5])
    expected = drawn(settings(str(tmp_path / "set")))
    for path in (tmp_path / "set").iterdir():
        if path.suffix != ".tar":
            path.unlink()
    cache = {"folder": str(tmp_path / "cache")}
    assert drawn(settings(f"file://{tmp_path}/set", cache=cache)) == expected
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache/sets").rglob("*.parquet")}
    assert len(made) == 2
    assert drawn(settings(f"file://{tmp_path}/set", cache=cache)) == expected
    assert made == {path: path.stat().st_mtime_ns for path in made}


def without_index(folder: Path) -> Path:
    for path in folder.iterdir():
        if path.suffix != ".tar":
            path.unlink()
    return folder


@pytest.fixture
def copied(monkeypatch) -> list[str]:
    """Names of the files that are fetched, as that happens."""
    names: list[str] = []
    copy = FileCache._copy

    def noting(self, url, target):
        names.append(url.rpartition("/")[2])
        return copy(self, url, target)

    monkeypatch.setattr(FileCache, "_copy", noting)
    return names


def test_indexing_a_remote_set_fetches_each_shard_once_for_reading_too(tmp_path, copied):
    write_set(tmp_path / "set", [6, 5])
    without_index(tmp_path / "set")
    drawn(settings(f"file://{tmp_path}/set", cache={"folder": str(tmp_path / "cache")}))
    assert sorted(copied) == ["00000.tar", "00001.tar"]
    assert len(list((tmp_path / "cache/files").glob("*.tar"))) == 2


def test_indexing_a_remote_set_that_was_killed_goes_on_and_sees_what_changed(tmp_path, copied):
    write_set(tmp_path / "set", [6, 5, 4])
    without_index(tmp_path / "set")
    config = settings(f"file://{tmp_path}/set", cache={"folder": str(tmp_path / "cache")})

    class Killed(BaseException):
        pass

    def die():
        if len(copied) == 2:
            raise Killed

    with pytest.raises(Killed):
        Reader(config, ImageText(tokenize, 8), batch_size=2, heartbeat=die)
    with Reader(config, ImageText(tokenize, 8), batch_size=2) as reader:
        assert reader.epoch_samples == 15
    assert copied == ["00000.tar", "00001.tar", "00002.tar"]
    write_set(tmp_path / "other", [6, 9])
    os.replace(tmp_path / "other/00001.tar", tmp_path / "set/00001.tar")
    with Reader(config, ImageText(tokenize, 8), batch_size=2) as reader:
        assert reader.epoch_samples == 19
    assert copied[3:] == ["00001.tar"]


def test_sources_share_the_cache_and_must_fit_into_it_together(tmp_path):
    for name, sizes in (("one", [6, 6]), ("two", [6, 6, 6])):
        write_set(tmp_path / name, sizes)
    size = 2 * sum((tmp_path / "one" / f"0000{n}.tar").stat().st_size for n in range(2))
    sources = [{"path": f"file://{tmp_path}/{name}", "name": name} for name in ("one", "two")]

    def config(size):
        cache = {"folder": str(tmp_path / "cache"), "size_gb": size / 1e9}
        return DataConfig(sources=sources, image_size=32, context_length=8, workers=0, block_shards=2, cache=cache)

    with Reader(config(1.1 * size), ImageText(tokenize, 8), batch_size=2) as reader:
        shares = list(reader._remote.values())
        assert sum(shares) <= 0.8 * 1.1 * size and min(shares) > 0.35 * size
    with pytest.raises(UserError, match=r"does not hold a block of file:.*one and file:.*two"):
        Reader(config(0.9 * size), ImageText(tokenize, 8), batch_size=2)


class OfOneHost(fsspec.AbstractFileSystem):
    """As sftp:// and webhdfs://: the host is the file system's, and no part of its paths."""

    protocol = "onehost"

    def __init__(self, host, **options):
        super().__init__(**options)
        self.host = host

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + path.partition("://")[2].partition("/")[2] if "://" in path else path

    @staticmethod
    def _get_kwargs_from_urls(url):
        return {"host": url.partition("://")[2].partition("/")[0]}

    def _open(self, path, mode="rb", **options):
        return io.BytesIO(f"{path} of {self.host}".encode())


def test_two_hosts_of_one_protocol_are_two_file_systems(tmp_path):
    fsspec.register_implementation("onehost", OfOneHost, clobber=True)
    cache = FileCache(tmp_path / "cache", 10_000)
    assert [read(cache, f"onehost://{host}/a.tar") for host in ("x", "y")] == [b"/a.tar of x", b"/a.tar of y"]


def test_shards_and_sidecars_are_fetched_ahead_of_need(tmp_path):
    write_set(tmp_path / "set", [4] * 8)
    cache = {"folder": str(tmp_path / "cache")}
    with Reader(
        settings(f"file://{tmp_path}/set", cache=cache), ImageText(tokenize, 8), batch_size=2, seed=1
    ) as reader:
        batches = reader.batches(0)
        next(batches)
        coming = reader.order.sources[0].coming_shards(0, 4)
        names = {f"{number:05d}.{kind}" for number in coming for kind in ("tar", "parquet")}
        deadline = time.monotonic() + 20
        while not names <= {p.name.partition("-")[2] for p in (tmp_path / "cache/files").iterdir()}:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        batches.close()


def test_a_cache_that_holds_no_block_and_a_url_that_holds_no_set_are_refused(tmp_path):
    write_set(tmp_path / "set", [6, 5])
    cache = {"folder": str(tmp_path / "cache"), "size_gb": 1e-6}
    with pytest.raises(UserError, match="does not hold a block"):
        Reader(settings(f"file://{tmp_path}/set", cache=cache), ImageText(tokenize, 8), batch_size=2)
    cache["size_gb"] = 1.0
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no .*tar shard"):
        Reader(settings(f"file://{tmp_path}/empty", cache=cache), ImageText(tokenize, 8), batch_size=2)
    with pytest.raises(UserError, match="check the URL"):
        Reader(settings("nonsense://bucket/set", cache=cache), ImageText(tokenize, 8), batch_size=2)

"""A set on object storage (a local S3 server): whole or not there, read by training as the local one is."""

import functools
import http.server
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from curation_sets import encoded, photo

from data_pipeline.curation.decisions import SetPath
from data_pipeline.curation.filters import FilterRules, filter_set
from data_pipeline.curation.publishing import publish
from data_pipeline.errors import UserError
from data_pipeline.reading import DataConfig, ImageText, Reader
from launch.cli import run


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    moto = pytest.importorskip("moto.server")
    with pytest.MonkeyPatch.context() as patch:
        running = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        running.start()
        host, port = running.get_host_and_port()
        for name, value in {
            "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        }.items():  # fmt: skip
            patch.setenv(name, value)
        yield f"http://{host}:{port}"
        running.stop()


@pytest.fixture
def bucket(server: str, request: pytest.FixtureRequest) -> str:
    name = f"bucket-{abs(hash(request.node.name)) % 10**8}"
    fsspec.filesystem("s3", skip_instance_cache=True).mkdir(name)
    return f"s3://{name}/sets"


@pytest.fixture
def folder(make_set: Callable[..., Path]) -> Path:
    return make_set("web", [encoded(photo(n)) for n in range(20)], rows_per_shard=4)


def batches(path: str, cache: Path) -> list[tuple[list[str], np.ndarray]]:
    def tokenize(texts: list[str]) -> torch.Tensor:
        return torch.tensor([list(text.encode()[-8:].ljust(8, b"\0")) for text in texts]).reshape(-1, 8)

    config = DataConfig(
        sources=[{"path": path}], image_size=32, context_length=8, workers=0, cache={"folder": str(cache)}
    )
    with Reader(config, ImageText(tokenize, 8), batch_size=6) as reader:
        found = itertools.islice(reader.batches(0), 5)
        return [([sample.key for sample in batch.samples], batch.views.numpy().copy()) for batch in found]


def same(left: list[Any], right: list[Any]) -> bool:
    return all(a[0] == b[0] and np.array_equal(a[1], b[1]) for a, b in zip(left, right, strict=True))


def test_training_reads_the_copy_as_it_reads_the_set(folder: Path, bucket: str, tmp_path: Path) -> None:
    assert run(["shards", "publish", str(folder), f"{bucket}/web"]) == 0
    local = batches(str(folder), tmp_path / "a")
    assert same(batches(f"{bucket}/web", tmp_path / "b"), local)
    filter_set(folder, FilterRules(expressions=("row % 3 > 0",)))
    again = publish(SetPath(folder), f"{bucket}/web")
    assert again.copied == 5, "sidecars have changed"
    filtered = batches(str(folder), tmp_path / "a")
    assert same(batches(f"{bucket}/web", tmp_path / "b"), filtered), "no former sidecar is taken from the cache"
    assert not same(local, filtered)
    assert publish(SetPath(folder), f"{bucket}/web").copied == 0


def test_a_copy_that_breaks_off_is_no_set_and_goes_on(
    folder: Path, bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    system, _ = fsspec.core.url_to_fs(f"{bucket}/web")  # the one that `publish` gets: fsspec keeps them
    put, left = system.put_file, [7]

    def failing(local: str, remote: str) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError("the line is cut")
        put(local, remote)

    with monkeypatch.context() as patch:
        patch.setattr(system, "put_file", failing)
        with pytest.raises(UserError, match="the line is cut"):
            publish(SetPath(folder), f"{bucket}/web", connections=1)
    names = [name.rpartition("/")[2] for name in fsspec.filesystem("s3", skip_instance_cache=True).ls(f"{bucket}/web")]
    assert "manifest.json" not in names and 0 < sum(name.endswith(".published.json") for name in names) < 5
    with pytest.raises(UserError, match="unfinished set"):
        batches(f"{bucket}/web", tmp_path / "b")
    assert publish(SetPath(folder), f"{bucket}/web").copied == 5 - sum(n.endswith(".published.json") for n in names)
    assert same(batches(f"{bucket}/web", tmp_path / "b"), batches(str(folder), tmp_path / "a"))


def test_no_shard_at_a_url_is_foreign_for_want_of_a_manifest(folder: Path, tmp_path: Path) -> None:
    (folder / "manifest.json").unlink()  # and nothing there was published: somebody copied a folder too early
    with pytest.raises(UserError, match="unfinished set"):
        batches(f"file://{folder}", tmp_path / "cache")


def test_the_first_shard_on_its_way_to_a_url_is_not_foreign(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    url = f"file://{tmp_path}/bucket"
    system, put = fsspec.filesystem("file"), fsspec.filesystem("file").put_file

    def failing(local: str, remote: str) -> None:
        put(local, remote)
        if remote.endswith(".tar"):
            raise OSError("the line is cut")

    with monkeypatch.context() as patch:
        patch.setattr(system, "put_file", failing)
        with pytest.raises(UserError, match="the line is cut"):
            publish(SetPath(folder), url, connections=1)
    assert (tmp_path / "bucket/00000.tar").exists() and not (tmp_path / "bucket/00000.published.json").exists()
    with pytest.raises(UserError, match="unfinished set"):
        batches(url, tmp_path / "cache")


def test_a_url_that_cannot_be_written_is_the_users_mistake(folder: Path, server: str) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        publish(SetPath(folder), "nosuch://bucket/web")
    assert os.environ["AWS_ENDPOINT_URL"] == server


def stored(url: str) -> dict[str, bytes]:
    system = fsspec.filesystem("s3", skip_instance_cache=True)
    return {name.rpartition("/")[2]: system.cat_file(name) for name in system.find(url)}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for n in range(10):
        (tmp_path / f"images/{n}.jpg").write_bytes(encoded(photo(n)))
    return tmp_path / "images"


def test_packing_straight_to_storage_leaves_no_tars_here(
    images: Path, bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (images / "7.jpg").rename(tmp_path / "7.jpg")
    rows = [f"images/{n}.jpg" for n in range(10)]
    (tmp_path / "t.csv").write_text("\n".join(["image", *rows]))
    command = ["shards", "pack", str(tmp_path / "t.csv")]
    options = ["--rows-per-shard", "3", "--workers", "1"]
    assert run([*command, str(tmp_path / "here/set"), *options]) == 0
    publish(SetPath(tmp_path / "here/set"), f"{bucket}/published")
    system, left = fsspec.core.url_to_fs(f"{bucket}/set")[0], [4]
    put = system.put_file

    def failing(local: str, remote: str) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError("the line is cut")
        put(local, remote)

    away = [*command, str(tmp_path / "away/set"), *options, "--tars-to", f"{bucket}/set"]
    with monkeypatch.context() as patch:
        patch.setattr(system, "put_file", failing)
        assert run(away) == 2  # in the second shard
    assert "manifest.json" not in stored(f"{bucket}/set") and (tmp_path / "away/set/00001.tar").exists()
    assert run(away) == 0
    assert not list((tmp_path / "away/set").glob("*.tar"))
    assert stored(f"{bucket}/set") == stored(f"{bucket}/published")
    (tmp_path / "7.jpg").rename(images / "7.jpg")  # its shard is brought back, written anew, and sent again
    for retried in ([*command, str(tmp_path / "here/set"), *options], away):
        assert run([*retried, "--retry", "image_missing"]) == 0
    publish(SetPath(tmp_path / "here/set"), f"{bucket}/published")
    assert stored(f"{bucket}/set") == stored(f"{bucket}/published") and not list((tmp_path / "away/set").glob("*.tar"))
    assert same(batches(f"{bucket}/set", tmp_path / "b"), batches(str(tmp_path / "here/set"), tmp_path / "a"))
    filter_set(tmp_path / "away/set", FilterRules(expressions=("row <> 4",)))  # sidecars are here
    assert publish(SetPath(tmp_path / "away/set"), f"{bucket}/set").copied == 1


@pytest.mark.slow
def test_fetching_in_parts_straight_to_storage(images: Path, bucket: str, tmp_path: Path) -> None:
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(images))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as site:
        threading.Thread(target=site.serve_forever, daemon=True).start()
        urls = [f"http://127.0.0.1:{site.server_port}/{n}.jpg" for n in range(12)]
        with fsspec.open(f"{bucket}/list.txt", "w") as file:  # the list may lie there, too
            file.write("\n".join(urls))
        options = ["--rows-per-shard", "3", "--workers", "1", "--private-network", "127.0.0.0/8", "--attempts", "1"]
        command = ["shards", "fetch", f"{bucket}/list.txt"]
        assert run([*command, str(tmp_path / "here/set"), *options]) == 0
        words = ["--parts", "2", "--tars-to", f"{bucket}/set"]
        assert run([*command, str(tmp_path / "away/set"), *options, *words]) == 0
        site.shutdown()
    publish(SetPath(tmp_path / "here/set"), f"{bucket}/published")
    assert stored(f"{bucket}/set") == stored(f"{bucket}/published")
    assert not list((tmp_path / "away").rglob("*.tar"))

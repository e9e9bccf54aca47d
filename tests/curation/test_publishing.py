"""A set on object storage (a local S3 server): whole or not there, read by training as the local one is."""

import itertools
import os
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
    assert publish(SetPath(folder), f"{bucket}/web").copied == 5 - sum(n.endswith(".published.json") for n in names)
    assert same(batches(f"{bucket}/web", tmp_path / "b"), batches(str(folder), tmp_path / "a"))


def test_a_url_that_cannot_be_written_is_the_users_mistake(folder: Path, server: str) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        publish(SetPath(folder), "nosuch://bucket/web")
    assert os.environ["AWS_ENDPOINT_URL"] == server

"""Sources that cannot seek: a batch at every step, and the loss of exactness said."""

import os
import tarfile
from itertools import islice

import pytest
from reading_sets import tokenize, write_set

from data_pipeline.errors import UserError
from data_pipeline.reading import DataConfig, ImageText, Reader


def config(*paths: str, samples: int | None = 20) -> DataConfig:
    sources = [{"path": path, "samples": samples} for path in paths]
    return DataConfig(sources=sources, image_size=32, context_length=8, workers=0)


@pytest.fixture
def url(tmp_path) -> str:
    write_set(tmp_path / "set", [10, 10])
    return f"pipe:cat {tmp_path}/set/{{00000..00001}}.tar"


def test_a_stream_gives_batches_and_says_what_is_lost(url):
    events: list[dict] = []
    with Reader(
        config(url), ImageText(tokenize, 8), batch_size=8, rank=1, world_size=2, events=events.append
    ) as reader:
        assert reader.epoch_samples == 20
        batches = list(islice(reader.batches(5), 6))
        with pytest.raises(UserError, match="drawn with replacement"):
            reader.lineage(5)
    assert not events  # said by rank 0 alone
    assert [batch.step for batch in batches] == [5, 6, 7, 8, 9, 10]
    assert all(batch.views.shape == (4, 2, 32, 32, 3) and batch.targets.has_text.all() for batch in batches)
    keys = [sample.key for batch in batches for sample in batch.samples]
    captions = [caption for batch in batches for caption in batch.targets.captions]
    assert len(set(keys)) > 5
    for key, caption in zip(keys, captions, strict=True):
        assert caption == f"picture {10 * int(key[:5]) + int(key[5:])}"
    with Reader(config(url), ImageText(tokenize, 8), batch_size=8, events=events.append):
        assert [event["kind"] for event in events] == ["inexact_order"]


def test_a_stream_that_is_cut_is_recorded_and_read_on_elsewhere(tmp_path):
    write_set(tmp_path / "set", [10, 10])
    cut = tmp_path / "set/00001.tar"
    with tarfile.open(cut) as archive:
        inside = archive.getmember("000010005.jpg").offset_data + 100
    os.truncate(cut, inside)
    events: list[dict] = []
    url = f"pipe:cat {tmp_path}/set/{{00000..00001}}.tar"
    with Reader(config(url), ImageText(tokenize, 8), batch_size=8, events=events.append, seed=1) as reader:
        assert all(len(batch) == 8 for batch in islice(reader.batches(0), 4))
    told = [event for event in events if event["kind"] == "damaged_shard"]
    assert told and {event["shard"] for event in told} == {f"pipe:cat {cut}"}
    assert {event["reason"] for event in told} == {"stream_damaged"}
    assert all("unexpected end of data" in event["detail"] for event in told)


def test_a_stream_that_gives_nothing_ends_the_run_instead_of_trying_for_ever(tmp_path):
    url = f"pipe:cat {tmp_path}/nowhere.tar"
    with (
        Reader(config(url), ImageText(tokenize, 8), batch_size=8) as reader,
        pytest.raises(UserError, match=r"gives no samples.*(exit 1|empty file).*by hand"),
    ):
        next(reader.batches(0))


def test_streams_neither_mix_with_sets_nor_guess_their_size(url, tmp_path):
    with pytest.raises(UserError, match="do not mix"):
        Reader(config(url, str(tmp_path / "set")), ImageText(tokenize, 8), batch_size=8)
    with pytest.raises(UserError, match="samples is missing"):
        Reader(config(url, samples=None), ImageText(tokenize, 8), batch_size=8)

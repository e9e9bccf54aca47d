"""Whole sets for evaluation: each sample once, in order, whatever the ranks."""

import io

import numpy as np
import torch
from PIL import Image
from reading_sets import picture, tokenize, write_set

from data_pipeline.reading import ImageText, evaluation_batches


def test_every_sample_once_in_order_with_labels_and_captions(tmp_path):
    write_set(tmp_path / "set", [5, 0, 6], classes=["a", "b", "c"])
    batches = list(evaluation_batches(tmp_path / "set", 16, 4, ImageText(tokenize, 8)))
    assert [len(batch) for batch in batches] == [4, 4, 3]
    assert torch.cat([batch.positions for batch in batches]).tolist() == list(range(11))
    assert torch.cat([batch.targets.labels for batch in batches]).tolist() == [n % 3 for n in range(11)]
    assert [caption for batch in batches for caption in batch.targets.captions] == [f"picture {n}" for n in range(11)]
    assert torch.equal(
        torch.cat([batch.targets.tokens for batch in batches]), tokenize([f"picture {n}" for n in range(11)])
    )
    with Image.open(io.BytesIO(picture(7))) as image:  # 40 x 32: its middle square
        expected = np.asarray(image.crop((4, 0, 36, 32)).resize((16, 16), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(batches[1].views[3, 0].numpy() - expected).mean() < 3  # scaled by 2 in the decoder


def test_ranks_share_the_set_without_overlap(tmp_path):
    write_set(tmp_path / "set", [5, 6])
    parts = [
        list(evaluation_batches(tmp_path / "set", 16, 3, ImageText(), rank=rank, world_size=3)) for rank in range(3)
    ]
    positions = [torch.cat([batch.positions for batch in part]).tolist() for part in parts]
    assert [number for part in positions for number in part] == list(range(11)) and {
        len(part) for part in positions
    } == {3, 4}


def test_a_sample_that_cannot_be_read_is_left_out_and_recorded(tmp_path):
    write_set(tmp_path / "set", [6], image=lambda n: b"\xff\xd8\xff broken" if n == 2 else picture(n))
    events: list[dict] = []
    batches = list(evaluation_batches(tmp_path / "set", 16, 4, ImageText(), events=events.append))
    assert torch.cat([batch.positions for batch in batches]).tolist() == [0, 1, 3, 4, 5]
    assert [(event["key"], event["reason"]) for event in events] == [("000000002", "image_truncated")]


def test_a_remote_set_is_read_through_the_cache(tmp_path):
    from data_pipeline.reading.config import CacheConfig

    write_set(tmp_path / "set", [3, 3])
    cache = CacheConfig(folder=str(tmp_path / "cache"))
    local = list(evaluation_batches(tmp_path / "set", 16, 4, ImageText()))
    remote = list(evaluation_batches(f"file://{tmp_path}/set", 16, 4, ImageText(), cache=cache))
    assert all(torch.equal(a.views, b.views) for a, b in zip(local, remote, strict=True))

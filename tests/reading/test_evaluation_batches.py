"""Whole sets for evaluation: each sample once, in order, whatever the ranks."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from reading_sets import picture, tokenize, write_set

from data_pipeline.reading import ImageText, evaluation_batches
from data_pipeline.reading.decode.centre import CROP_MODE, INTERPOLATION


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


SIZES = [(640, 480), (480, 641), (333, 500), (40, 32), (32, 40), (64, 64), (33, 31), (700, 65)]


def varied(number: int) -> bytes:
    """A JPEG or PNG with fine detail, larger, equal to and smaller than the view, either way up."""
    width, height = SIZES[number]
    pixels = np.random.default_rng(number).integers(0, 256, (height // 2 + 1, width // 2 + 1, 3), dtype=np.uint8)
    image, stream = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC), io.BytesIO()
    image.save(stream, "JPEG" if number % 2 == 0 else "PNG", quality=90)
    return stream.getvalue()


@pytest.mark.parametrize("fraction", [1.0, 0.95, 0.875])
def test_pictures_are_those_of_timms_evaluation_transform(fraction, tmp_path):
    """Decoded by Pillow and transformed as timm's validate.py does it, level by level."""
    timm_data = pytest.importorskip("timm.data")
    write_set(tmp_path / "set", [len(SIZES)], image=varied)
    (batch,) = evaluation_batches(tmp_path / "set", 64, len(SIZES), ImageText(), crop_fraction=fraction)
    settings = {"input_size": (3, 64, 64), "interpolation": INTERPOLATION, "crop_mode": CROP_MODE}
    theirs = timm_data.create_transform(**settings, crop_pct=fraction, mean=(0, 0, 0), std=(1, 1, 1))
    for number, ours in enumerate(batch.views[:, 0]):
        image = Image.open(io.BytesIO(varied(number))).convert("RGB")
        assert torch.equal(ours.permute(2, 0, 1), (theirs(image) * 255).round().byte()), SIZES[number]


def test_the_crop_says_where_in_the_picture_the_view_lies(tmp_path):
    write_set(tmp_path / "set", [len(SIZES)], image=varied)
    (batch,) = evaluation_batches(tmp_path / "set", 64, len(SIZES), ImageText())
    for (width, height), (top, left, high, wide, flip, source) in zip(SIZES, batch.crops[:, 0].tolist(), strict=True):
        side = min(width, height)
        assert [high, wide] == pytest.approx([side, side], rel=0.02) and (flip, source) == (0, width)
        assert [top, left] == pytest.approx([(height - side) / 2, (width - side) / 2], abs=max(1, side / 64))


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

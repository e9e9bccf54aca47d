"""Image headers against Pillow."""

import io

import numpy as np
import pytest
from PIL import Image

from data_pipeline.format.image_header import ImageHeader, is_image, read_image_header, too_many_scans

SIZES = [(1, 1), (7, 300), (513, 64)]
KINDS = [
    ("JPEG", "jpeg", {}),
    ("JPEG", "jpeg", {"progressive": True, "comment": b"c" * 70}),
    ("PNG", "png", {}),
    ("WEBP", "webp", {}),
    ("WEBP", "webp", {"lossless": True}),
    ("GIF", "gif", {}),
    ("BMP", "bmp", {}),
    ("TIFF", "tiff", {}),
    ("TIFF", "tiff", {"big_endian": True}),
]


def encoded(kind: str, size: tuple[int, int], mode: str = "RGB", **options: object) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("kind", "name", "options"), KINDS)
def test_format_and_size_are_pillows(kind: str, name: str, options: dict, size: tuple[int, int]) -> None:
    assert read_image_header(encoded(kind, size, **options)) == (name, *size)


def test_webp_with_alpha_is_the_extended_form() -> None:
    data = encoded("WEBP", (33, 21), "RGBA")
    assert read_image_header(data) == ("webp", 33, 21)
    frames = [Image.new("RGB", (33, 21), colour) for colour in ("red", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:])
    assert buffer.getvalue()[12:16] == b"VP8X" and read_image_header(buffer.getvalue()) == ("webp", 33, 21)


def test_an_exif_block_before_the_frame_is_stepped_over() -> None:
    exif = Image.Exif()
    exif[274] = 6
    assert read_image_header(encoded("JPEG", (40, 20), exif=exif)) == ("jpeg", 40, 20)  # as stored, not as shown


@pytest.mark.parametrize(("kind", "name", "options"), KINDS)
def test_every_cut_gives_the_true_size_or_nothing(kind: str, name: str, options: dict) -> None:
    data = encoded(kind, (60, 40), **options)
    seen = {read_image_header(data[:cut]) for cut in range(min(len(data), 1200))}
    assert seen <= {None, (name, 60, 40)}


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xd8", b"<html>", b"%PDF-1.7", b"RIFF\x00\x00\x00\x00WAVEfmt ", b"\0" * 64]
)
def test_what_is_no_image_has_no_header(data: bytes) -> None:
    assert read_image_header(data) is None


@pytest.mark.parametrize("size", [(16, 16), (300, 70)])
def test_avif_is_known_by_its_boxes(size: tuple[int, int]) -> None:
    data = encoded("AVIF", size)
    assert is_image(data[:32]) and read_image_header(data) == ("avif", *size)
    assert {read_image_header(data[:cut]) for cut in range(len(data))} <= {None, ("avif", *size)}


def test_only_many_scans_over_many_pixels_are_too_many() -> None:
    usual = encoded("JPEG", (64, 48), progressive=True)
    many = usual[:-2] + b"\xff\xda\x00\x08" * 200 + usual[-2:]
    assert not too_many_scans(usual, ImageHeader("jpeg", 8000, 6000))
    assert not too_many_scans(many, ImageHeader("jpeg", 64, 48))
    assert too_many_scans(many, ImageHeader("jpeg", 8000, 5000))


def test_scans_are_counted_only_where_a_jpeg_can_have_many() -> None:
    extra = b"\xff\xda\x00\x08" * 200
    for mode, progressive, counted in (
        ("RGB", False, False),
        ("L", False, False),
        ("RGB", True, True),
        ("L", True, True),
    ):
        data = encoded("JPEG", (64, 48), mode, progressive=progressive)
        assert too_many_scans(data[:-2] + extra + data[-2:], ImageHeader("jpeg", 8000, 6000)) == counted
    assert too_many_scans(b"\xff\xd8" + extra, ImageHeader("jpeg", 8000, 6000))  # damaged: all that may be one counts

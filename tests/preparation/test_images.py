"""What becomes of images of every kind on their way into a shard; Pillow and NumPy are the oracle."""

import io
import struct
import zlib
from collections.abc import Callable

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from data_pipeline.errors import UserError
from data_pipeline.preparation.packing.images import prepare
from data_pipeline.preparation.packing.rules import ImageRules, Prepared, Refused
from data_pipeline.reading.decode.pixels import decode, read_header

RULES = ImageRules()


def pixels(result: Prepared | Refused) -> np.ndarray:
    assert isinstance(result, Prepared), result
    image = Image.open(io.BytesIO(result.data))
    assert (image.format.lower(), *image.size) == (result.format, result.width, result.height)
    assert image.getexif().get(274, 1) == 1
    return np.asarray(image.convert("RGB")).astype(int)


def near(one: np.ndarray, other: np.ndarray, levels: float = 4) -> bool:
    return one.shape == other.shape and np.abs(one - other).mean() < levels


@pytest.mark.parametrize(("kind", "extension"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")])
def test_a_sound_opaque_upright_image_keeps_its_bytes(
    kind: str, extension: str, picture: Callable, encode: Callable
) -> None:
    for mode in ("RGB", "L") if kind != "WEBP" else ("RGB",):
        data = encode(picture(0).convert(mode), kind)
        assert prepare(data, RULES) == Prepared(data, extension, kind.lower(), 40, 30)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int, picture: Callable, encode: Callable) -> None:
    upright = np.asarray(picture(0)).astype(int)
    # How the upright picture must be stored for this tag to show it: TIFF 6.0, tag 274.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    data = encode(Image.fromarray(stored.astype(np.uint8)), exif=exif)
    assert near(pixels(prepare(data, RULES)), upright)
    shrunk = pixels(prepare(data, ImageRules(shorter_side=15)))
    assert shrunk.shape == (15, 20, 3) and near(shrunk, np.asarray(picture(0).resize((20, 15))).astype(int), 6)


@pytest.mark.parametrize(
    ("kind", "mode"), [("PNG", "RGBA"), ("PNG", "LA"), ("WEBP", "RGBA"), ("GIF", "P"), ("PNG", "P")]
)
def test_transparency_is_laid_on_white(kind: str, mode: str, encode: Callable) -> None:
    image = Image.new("RGBA", (40, 30), (200, 200, 200, 0))
    image.paste((60, 60, 60, 255), (0, 0, 20, 30))
    if mode == "P":
        data = encode(image if kind == "GIF" else image.quantize(4), kind)
        assert Image.open(io.BytesIO(data)).has_transparency_data
    else:
        data = encode(image.convert(mode), kind, **({"lossless": True} if kind == "WEBP" else {}))
    found = pixels(prepare(data, RULES))
    assert abs(found[:, :16] - 60).max() < 12 and found[:, 24:].min() > 240


def test_half_transparent_is_half_white(encode: Callable) -> None:
    data = encode(Image.new("RGBA", (16, 16), (0, 0, 0, 128)), "PNG")
    assert abs(pixels(prepare(data, RULES)) - 127).max() <= 2


def test_cmyk_becomes_rgb(encode: Callable) -> None:
    found = prepare(encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0))), RULES)
    assert abs(pixels(found) - [255, 0, 0]).max() <= 3
    assert Image.open(io.BytesIO(found.data)).mode == "RGB"


def test_sixteen_bits_become_eight_without_clipping() -> None:
    ramp = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (8, 1))
    for image in (ramp, np.stack([ramp] * 3, -1)):
        for suffix in (".png", ".tiff"):
            data = cv2.imencode(suffix, image)[1].tobytes()
            found = prepare(data, RULES)
            if suffix == ".tiff" and image.ndim == 3 and isinstance(found, Refused):
                assert (
                    found.reason == "image_undecodable"
                )  # Pillow reads no 16-bit RGB TIFF; it is refused, not spoiled
                continue
            assert found.extension == "jpg"
            assert np.abs(pixels(found)[..., 0] - (ramp / 257).round()).mean() < 2


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF"])
def test_other_formats_become_jpeg(kind: str, picture: Callable, encode: Callable) -> None:
    found = prepare(encode(picture(0), kind), RULES)
    assert (found.extension, found.format) == ("jpg", "jpeg")
    assert near(pixels(found), np.asarray(picture(0)).astype(int), 8)


def test_of_an_animation_the_first_frame_is_taken(encode: Callable) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
        assert abs(pixels(prepare(data, RULES)) - [255, 0, 0]).max() < 12, kind


@pytest.mark.parametrize(("size", "expected"), [((400, 300), (85, 64)), ((300, 400), (64, 85)), ((64, 64), (64, 64))])
def test_shrinking_keeps_the_shape_and_is_antialiased(
    size: tuple[int, int], expected: tuple[int, int], picture: Callable, encode: Callable
) -> None:
    for kind in ("JPEG", "PNG"):
        found = prepare(encode(picture(3, size), kind), ImageRules(shorter_side=64))
        assert (found.width, found.height) == expected
        assert near(pixels(found), np.asarray(picture(3, size).resize(expected, Image.BICUBIC)).astype(int))
    checks = Image.fromarray((np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8))
    assert pixels(prepare(encode(checks, "PNG"), ImageRules(shorter_side=50))).std() < 3  # no moiré


def test_nothing_is_enlarged(picture: Callable, encode: Callable) -> None:
    data = encode(picture(0))
    assert prepare(data, ImageRules(shorter_side=64)).data == data


def test_a_bomb_is_refused_before_it_is_decoded() -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )
    assert prepare(bomb, RULES) == Refused("too_many_pixels", 60_000, 60_000)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "image_empty"),
        (b"<html>", "not_an_image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", "not_an_image"),
        (b"\xff\xd8\xff\xe0\x00", "image_truncated"),
        (b"RIFF\x24\0\0\0WEBPVP8 \x18\0\0\0" + bytes(3) + b"\x9d\x01\x2a\x10\0\x10\0" + bytes(8), "image_undecodable"),
    ],
)
def test_what_cannot_be_read_has_its_reason(data: bytes, reason: str) -> None:
    result = prepare(data, RULES)
    assert isinstance(result, Refused) and result.reason == reason


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF"])
def test_a_cut_image_is_never_packed_and_never_raises(kind: str, picture: Callable, encode: Callable) -> None:
    data = encode(picture(0), kind)
    for cut in range(1, len(data) - len(data) // 8, max(1, len(data) // 50)):
        assert isinstance(prepare(data[:cut], RULES), Refused), cut


def test_small_images_are_rejected_where_asked(picture: Callable, encode: Callable) -> None:
    assert prepare(encode(picture(0)), ImageRules(min_side=31)) == Refused("too_small", 40, 30)


@pytest.mark.parametrize("wrong", [{"shorter_side": 0}, {"quality": 101}, {"max_pixels": 0}, {"max_pixels": 10**9}])
def test_wrong_rules_are_the_users_error(wrong: dict) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        ImageRules(**wrong)


@pytest.mark.parametrize("kind", ["TIFF", "WEBP", "PNG", "AVIF", "JPEG"])
@pytest.mark.parametrize("orientation", [3, 6])
def test_pack_and_reader_agree_on_what_is_upright(
    kind: str, orientation: int, picture: Callable, encode: Callable
) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    data = encode(picture(5), kind, exif=exif)
    packed = prepare(data, RULES).data
    as_packed, as_read = (decode(one, read_header(one, 10**7)).astype(int) for one in (packed, data))
    assert near(as_packed, as_read, 6)
    shown = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")).astype(int)
    assert near(as_read, shown, 2)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("rules", [ImageRules(), ImageRules(shorter_side=20)])
def test_a_jpeg_that_lacks_only_its_end_marker_is_kept_and_noted(
    rules: ImageRules, progressive: bool, picture: Callable, encode: Callable
) -> None:
    data = encode(picture(0), progressive=progressive)
    found = prepare(data[:-2], rules)
    assert found == prepare(data, rules)._replace(note="end_marker_added")
    assert prepare(data[:-3], rules).reason == "image_truncated"


@pytest.mark.parametrize("format", ["jpg", "png", "webp"])
def test_a_set_may_have_one_image_format(format: str, picture: Callable, encode: Callable) -> None:
    for kind in ("JPEG", "PNG", "WEBP", "GIF"):
        data = encode(picture(0), kind)
        found = prepare(data, ImageRules(format=format))
        assert (found.extension, Image.open(io.BytesIO(found.data)).format.lower()) == (format, found.format)
        assert (found.data == data) == (found.format == kind.lower())
        assert near(pixels(found), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int), 6)


def test_floats_are_packed_in_their_range() -> None:
    file = io.BytesIO()
    Image.fromarray(np.linspace(0, 1, 640, dtype=np.float32).reshape(16, 40)).save(file, "TIFF")
    found = pixels(prepare(file.getvalue(), RULES))
    assert near(found[..., 0], np.linspace(0, 255, 640).reshape(16, 40), 3)


def test_a_jpeg_of_two_hundred_scans_is_refused_before_it_is_decoded(encode: Callable) -> None:
    data = encode(Image.new("L", (6000, 4000)), progressive=True)
    data = data[:-2] + b"\xff\xda\x00\x08" * 200 + data[-2:]
    assert prepare(data, RULES) == Refused("too_many_scans", 6000, 4000)


@pytest.mark.parametrize("head", [b"\0\0\0\x1cftypheic", b"\xff\x0a\xfa\x7f", b"\0\0\0\x0cJXL \r\n\x87\n"])
def test_pictures_of_other_formats_are_named_so(head: bytes) -> None:
    assert prepare(head + bytes(100), RULES) == Refused("format_unsupported")

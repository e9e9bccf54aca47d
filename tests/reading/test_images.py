"""Decoding and views against Pillow, the field's yardstick."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps, PngImagePlugin
from reading_sets import picture
from scipy.ndimage import gaussian_filter

from data_pipeline.hashing import key, uniforms, uniforms_at
from data_pipeline.reading.config import AugmentationConfig
from data_pipeline.reading.decode.augmentation import augment, change_colours, erase, leave_out_parts, turn
from data_pipeline.reading.decode.pixels import BadSample, decode, read_header
from data_pipeline.reading.decode.views import (
    UNIFORMS,
    Crop,
    enlarged,
    on_reduced,
    random_crop,
    reduction,
    render,
)

LIMIT = 10**7


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def decoded(data: bytes, reduce: int = 1) -> np.ndarray:
    return decode(data, read_header(data, LIMIT), reduce)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpeg_decoding_is_bit_identical_to_pillows(mode):
    data = picture(1, size=(61, 47), mode=mode)
    assert read_header(data, LIMIT).decoder == "simplejpeg"
    assert np.array_equal(decoded(data), np.asarray(opened(data).convert("RGB")))


@pytest.mark.parametrize(
    ("kind", "mode"), [("PNG", "RGB"), ("PNG", "L"), ("PNG", "P"), ("GIF", "P"), ("BMP", "RGB"), ("TIFF", "RGB")]
)
def test_other_formats_decode_as_pillow_does(kind, mode):
    data = picture(2, size=(33, 21), kind=kind, mode=mode)
    assert np.array_equal(decoded(data), np.asarray(opened(data).convert("RGB")))


def test_cmyk_jpeg_and_webp_decode_as_pillow_does():
    for data in (picture(3, mode="CMYK"), picture(3, kind="WEBP")):
        assert np.array_equal(decoded(data), np.asarray(opened(data).convert("RGB")))


def test_transparent_pixels_lie_on_white():
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[:4] = (200, 100, 0, 255)
    rgba[4:6] = (200, 100, 0, 128)
    file = io.BytesIO()
    Image.fromarray(rgba).save(file, "PNG")
    found = decoded(file.getvalue())
    assert (found[:4] == (200, 100, 0)).all() and (found[6:] == 255).all()
    assert np.abs(found[4:6].astype(int) - (227, 177, 127)).max() <= 1


def test_16_bit_grey_keeps_its_range():
    levels = np.array([[0, 257 * 128, 65535]], np.uint16)
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "PNG")
    assert decoded(file.getvalue())[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation, kind):
    image = opened(picture(4, size=(32, 16)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    image.save(file, kind, exif=exif)
    header = read_header(file.getvalue(), LIMIT)
    expected = np.asarray(ImageOps.exif_transpose(opened(file.getvalue())))
    assert (header.height, header.width) == expected.shape[:2]
    assert np.array_equal(decode(file.getvalue(), header), expected)
    if kind == "JPEG":
        assert decode(file.getvalue(), header, 2).shape == (expected.shape[0] // 2, expected.shape[1] // 2, 3)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "image_empty"),
        (b"<html>", "not_an_image"),
        (picture(5)[:20], "image_truncated"),
        (picture(5)[:-100], "image_truncated"),
        (picture(5, kind="PNG")[:-60], "image_truncated"),
    ],
)
def test_what_cannot_be_decoded_says_why(data, reason):
    with pytest.raises(BadSample) as caught:
        decoded(data)
    assert caught.value.reason == reason


def test_too_many_pixels_are_refused_before_decoding():
    with pytest.raises(BadSample) as caught:
        read_header(picture(6, size=(100, 50)), 4999)
    assert caught.value.reason == "too_many_pixels"
    assert read_header(picture(6, size=(100, 50)), 5000).width == 100


@given(st.integers(1, 900), st.integers(1, 900), st.integers(0, 10**9))
def test_crops_lie_within_the_image_and_their_limits(width, height, position):
    u = uniforms(3, np.array([position]), UNIFORMS)[0].tolist()
    crop = random_crop(width, height, u, (0.2, 1.0), (0.75, 4 / 3), 0.5)
    assert 0 <= crop.top <= crop.top + crop.height <= height and 0 <= crop.left <= crop.left + crop.width <= width
    assert crop.height > 0 and crop.width > 0 and crop.source_width == width
    if min(width, height) > 60 and 0.75 <= width / height <= 4 / 3:
        assert 0.19 <= crop.height * crop.width / (width * height) <= 1
        assert 0.72 <= crop.width / crop.height <= 1.4


def test_crops_spread_over_areas_places_and_sides():
    chances = uniforms(8, np.arange(4000), UNIFORMS)
    crops = np.array([random_crop(400, 400, u.tolist(), (0.2, 1.0), (0.75, 4 / 3), 0.5) for u in chances], float)
    area = crops[:, 2] * crops[:, 3] / 160000
    assert area.min() < 0.21 and 0.5 < area.mean() < 0.6 and abs(crops[:, 4].mean() - 0.5) < 0.03
    assert abs(np.corrcoef(crops[:, 0], crops[:, 1])[0, 1] - 0) < 0.5
    assert abs((crops[:, 0] / np.maximum(1, 400 - crops[:, 2])).mean() - 0.5) < 0.03


@pytest.mark.parametrize(
    "crop", [Crop(3, 5, 40, 50, False, 90), Crop(0, 0, 70, 90, True, 90), Crop(10, 7, 12, 16, True, 90)]
)
def test_views_are_within_one_level_of_pillows_antialiased_resize_of_the_flipped_image(crop):
    pixels = decoded(picture(7, size=(90, 70)))
    view = np.empty((24, 24, 3), np.uint8)
    render(pixels, crop, view)
    whole = Image.fromarray(pixels)
    flipped = ImageOps.mirror(whole) if crop.flip else whole
    part = flipped.crop((crop.left, crop.top, crop.left + crop.width, crop.top + crop.height))
    expected = np.asarray(part.resize((24, 24), Image.Resampling.BICUBIC))
    assert np.abs(view.astype(int) - expected).max() <= 1


def test_a_crop_of_the_right_size_is_not_resampled():
    pixels = decoded(picture(8, size=(40, 40)))
    view = np.empty((16, 16, 3), np.uint8)
    render(pixels, Crop(4, 2, 16, 16, True, 40), view)
    assert np.array_equal(view, pixels[:, ::-1][4:20, 2:18])


def test_reduced_decoding_keeps_the_crops_geometry():
    data = picture(9, size=(400, 300))
    header = read_header(data, LIMIT)
    crop = Crop(21, 33, 201, 250, True, 400)
    assert reduction([crop], 100) == 2 and reduction([crop], 101) == 1 and reduction([crop], 25) == 8
    pixels = decode(data, header, 2)
    used = on_reduced(crop, 2, pixels)
    back = enlarged(used, 2)
    assert pixels.shape == (150, 200, 3)
    assert max(abs(a - b) for a, b in zip(back[:4], crop[:4], strict=True)) <= 2 and back.source_width == 400
    view, exact = np.empty((2, 50, 50, 3), np.uint8)
    render(pixels, used, view)
    render(decode(data, header), Crop(*(int(v) for v in back[:4]), True, 400), exact)
    assert np.abs(view.astype(int) - exact).mean() < 2


def test_colour_jitter_is_its_four_changes_one_after_the_other():
    """Against each done by itself in floating point, on colours far enough from black and white that none is cut."""
    rng = np.random.default_rng(0)
    luma = np.array([0.299, 0.587, 0.114])
    for _ in range(20):
        view, u = rng.integers(90, 150, (16, 16, 3), dtype=np.uint8), rng.random(8).tolist()
        expected = view.astype(np.float64)
        for operation in sorted(range(4), key=lambda n: u[(3, 4, 5, 7)[n]]):
            grey = (expected @ luma)[..., None]
            if operation == 3:  # hue: the colour vector turns about the axis of greys, seen from equal luma
                angle = 2 * np.pi * 0.1 * (2 * u[6] - 1)
                i, q = expected @ [0.596, -0.274, -0.322], expected @ [0.211, -0.523, 0.312]
                i, q = i * np.cos(angle) - q * np.sin(angle), i * np.sin(angle) + q * np.cos(angle)
                yiq = np.stack([grey[..., 0], i, q])
                axes = np.array([luma, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
                expected = np.linalg.solve(axes, yiq.reshape(3, -1)).T.reshape(expected.shape)
                continue
            factor = 1 + 0.4 * (2 * u[operation] - 1)
            pivot = [0.0, grey.mean(), grey][operation]
            expected = pivot + factor * (expected - pivot)
        change_colours(view, (0.4, 0.4, 0.4, 0.1), u)
        assert np.abs(view - expected).max() < 1  # rounding, and OpenCV counts factors in 1/1024


def test_numbers_of_one_position_are_those_of_many():
    for stream in (0, key(1, 2, 3), 2**64 - 1):
        for position in (0, 7, 10**12):
            many = uniforms(stream, np.array([position, 3]), 9)[0].tolist()
            assert uniforms_at(stream, position, 9) == many


def test_colour_jitter_changes_colours_by_its_strength():
    view = decoded(picture(10, size=(16, 16))).copy()
    before = view.copy()
    change_colours(view, (0.4, 0.4, 0.4, 0), [0.5, 0.5, 0.5, 0.1, 0.2, 0.3, 0, 0])  # factors of exactly 1
    assert np.array_equal(view, before)
    change_colours(view, (0.4, 0.4, 0.4, 0), [1.0, 0.5, 0.5, 0.1, 0.2, 0.3, 0, 0])  # brightness 1.4, the rest 1
    assert np.abs(view - np.clip(before * 1.4, 0, 255)).max() <= 1
    grey = before.copy()
    change_colours(grey, (1.0, 1.0, 1.0, 0), [0.5, 0.5, 0.0, 0.1, 0.2, 0.3, 0, 0])  # saturation 0
    assert np.ptp(grey, axis=2).max() <= 1


def test_a_grey_view_is_the_luma_of_what_the_jitter_made():
    view = decoded(picture(10, size=(16, 16))).copy()
    expected = view @ np.array([0.299, 0.587, 0.114])
    change_colours(view, (0, 0, 0, 0), [0.5] * 8, grey=True)
    assert np.ptp(view, axis=2).max() == 0 and np.abs(view[..., 0] - expected).max() <= 1


def test_each_augmentation_is_drawn_with_its_own_probability_of_its_own_view():
    """1000 positions: blur in all first views and a tenth of the second, solarize in a fifth of the second alone."""
    config = AugmentationConfig(blur=(1.0, 0.1), solarize=(0.0, 0.2), jitter=0.8, color_jitter=0.4, grey=0.2)
    before = np.tile(np.array([[[30, 60, 90], [200, 150, 220]]], np.uint8), (16, 8, 1))
    changed = {name: np.zeros((2, 1000)) for name in ("blur", "solarize", "jitter", "grey")}
    for name, seen in changed.items():
        alone = {"blur": 0.0, "solarize": 0.0, "grey": 0.0, "color_jitter": 0.0}
        alone |= {"color_jitter": 0.4} if name == "jitter" else {name: getattr(config, name)}
        one = AugmentationConfig(**alone, jitter=0.8, blur_sigma=(1.0, 2.0))
        for number in (0, 1):
            for position in range(1000):
                view = before.copy()
                augment(view, one, 5, position, number)
                seen[number, position] = not np.array_equal(view, before)
    shares = {name: seen.mean(1).tolist() for name, seen in changed.items()}
    expected = {"blur": (1.0, 0.1), "solarize": (0.0, 0.2), "jitter": (0.8, 0.8), "grey": (0.2, 0.2)}
    for name, pair in expected.items():
        assert shares[name] == pytest.approx(list(pair), abs=0.04), name
    both = changed["jitter"][0] * changed["jitter"][1]
    assert both.mean() == pytest.approx(0.64, abs=0.05)  # the views draw apart


def test_solarizing_inverts_what_is_brighter_than_half_and_blur_is_gaussian():
    before = decoded(picture(10, size=(32, 32)))
    view = before.copy()
    augment(view, AugmentationConfig(solarize=1.0), 1, 2, 0)
    assert np.array_equal(view, np.where(before >= 128, 255 - before, before))
    augment(view := before.copy(), AugmentationConfig(blur=1.0, blur_sigma=(1.5, 1.5)), 1, 2, 0)
    exact = gaussian_filter(before.astype(float), (1.5, 1.5, 0), mode="mirror")
    assert np.abs(view - exact).max() < 2


def test_turning_moves_pixels_as_the_angle_and_the_shift_say():
    view = np.zeros((33, 33, 3), np.uint8)
    view[16, 26] = 250  # right of the centre
    quarter = turn(view, 90.0, 0.0, [1.0, 0.5, 0.5])  # anticlockwise: above the centre
    assert np.unravel_index(quarter[..., 0].argmax(), (33, 33)) == (6, 16)
    moved = turn(view, 0.0, 4 / 33, [0.5, 1.0, 0.0])
    assert np.unravel_index(moved[..., 0].argmax(), (33, 33)) == (12, 30)
    wide = np.zeros((20, 40, 3), np.uint8)
    wide[5, 10] = 250
    moved = turn(wide, 0.0, 0.1, [0.5, 1.0, 1.0])  # by a tenth of each side
    assert np.unravel_index(moved[..., 0].argmax(), (20, 40)) == (7, 14)


def test_parts_of_a_caption_are_left_out_by_their_share_and_one_always_stays():
    caption = "koala, marsupial, animal mammal, animals & nature"
    said = [leave_out_parts(caption, 0.5, 7, position) for position in range(2000)]
    assert all(said) and said == [leave_out_parts(caption, 0.5, 7, position) for position in range(2000)]
    for part in caption.split(", "):
        assert sum(part in one.split(", ") for one in said) / 2000 == pytest.approx(0.5 + 0.5**4 / 4, abs=0.04)
    assert {len(one.split(", ")) for one in said} == {1, 2, 3, 4}
    assert leave_out_parts("koala", 0.9, 7, 1) == "koala"


def test_erasing_fills_a_box_of_its_area():
    view = np.zeros((64, 64, 3), np.uint8)
    erase(view, 0.0, [0.0, 1.0, 0.5, 0.5, 0.5], 1)
    assert not view.any()
    erase(view, 1.0, [0.0, 0.999, 0.5, 0.5, 0.5], 1)
    rows, columns = np.flatnonzero(view.any((1, 2))), np.flatnonzero(view.any((0, 2)))
    area = (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
    assert 0.28 < area / 64**2 < 0.36 and view[rows[0] : rows[-1], columns[0] : columns[-1]].std() > 60


def turned(kind: str, place: str) -> bytes:
    """A 32 x 16 picture that is to be turned by a quarter; `place`: where the file says so."""
    image, exif = opened(picture(4, size=(32, 16))), Image.Exif()
    exif[0x0112] = 6
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    options = {"exif": {"exif": exif}, "xmp": {"xmp": xmp}, "late": {"exif": exif, "icc_profile": bytes(200_000)}}[
        place
    ]
    file = io.BytesIO()
    if kind == "PNG" and place == "xmp":
        text = PngImagePlugin.PngInfo()
        text.add_itxt("XML:com.adobe.xmp", xmp.decode())
        options = {"pnginfo": text}
    image.save(file, kind, **options)
    data = file.getvalue()
    if kind == "JPEG" and place == "late":  # the profile's segments before EXIF's
        begin = data.index(b"Exif") - 4
        length = 2 + int.from_bytes(data[begin + 2 : begin + 4], "big")
        tables = data.index(b"\xff\xdb", begin)
        data = data[:begin] + data[begin + length : tables] + data[begin : begin + length] + data[tables:]
        assert data.index(b"Exif") > 70_000
    return data


@pytest.mark.parametrize("place", ["exif", "xmp", "late"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_pixels_are_turned_once_wherever_the_file_says_so(kind, place):
    if kind in ("TIFF", "AVIF") and place != "exif":
        pytest.skip("one place alone")
    data = turned(kind, place)
    header, found = read_header(data, LIMIT), decoded(data)
    expected = np.asarray(ImageOps.exif_transpose(opened(data)).convert("RGB")).astype(int)
    assert (header.height, header.width) == found.shape[:2] == expected.shape[:2] == (32, 16)
    assert np.abs(found - expected).max() <= 2


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.0, 255.0), (0.0, 65535.0), (-5.0, 5.0)])
def test_floats_are_scaled_by_the_range_they_are_written_in(low, high):
    levels = np.linspace(low, high, 64, dtype=np.float32)[None].repeat(4, 0)
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "TIFF")
    found = decoded(file.getvalue())[0, :, 0]
    assert np.abs(found - np.linspace(0, 255, 64)).max() <= 1


def test_a_jpeg_of_two_hundred_scans_is_bad_before_it_is_decoded():
    file = io.BytesIO()
    Image.new("L", (6000, 4000)).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    with pytest.raises(BadSample, match="too_many_scans"):
        read_header(data[:-2] + b"\xff\xda\x00\x08" * 200 + data[-2:], 10**8)

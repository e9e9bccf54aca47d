"""Small images and sets on disk."""

import importlib.util
import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def smooth(number: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """A picture of soft gradients, so that JPEG keeps it nearly; another one for every number."""
    x, y = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
    planes = [127 + 120 * np.sin(3 * x + number), 127 + 120 * np.cos(2 * y + number), 255 * (x + y) / 2]
    return Image.fromarray(np.stack(planes, -1).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 95, "subsampling": 0} if kind == "JPEG" else {}) | options)
    return buffer.getvalue()


@pytest.fixture
def picture() -> Callable[..., Image.Image]:
    return smooth


@pytest.fixture
def encode() -> Callable[..., bytes]:
    return encoded


@pytest.fixture
def captioned(tmp_path: Path) -> Path:
    """A folder of 12 rows: 8 sound images with captions, 4 that cannot be packed."""
    folder = tmp_path / "captioned"
    folder.mkdir()
    for number in range(8):
        (folder / f"{number:02d}.jpg").write_bytes(encoded(smooth(number)))
        (folder / f"{number:02d}.txt").write_text(f"picture number {number}\n")
    (folder / "08.jpg").write_bytes(b"")
    (folder / "09.png").write_bytes(b"<html>gone</html>")
    (folder / "10.jpg").write_bytes(encoded(smooth(1))[:-200])
    (folder / "11.jpg").write_bytes(encoded(smooth(1)))
    (folder / "11.txt").write_bytes(b"caf\xe9")
    return folder


@pytest.fixture
def site() -> Iterator[object]:
    """A web server to fetch from; see site.py."""
    spec = importlib.util.spec_from_file_location("preparation_site", Path(__file__).with_name("site.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with module.running(module.Site(encoded(smooth(0)))) as running:
        yield running

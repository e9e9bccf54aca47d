"""Small shards made with `tarfile`, which is also the oracle for reading them."""

import io
import json
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

Samples = Mapping[str, bytes]


def picture(number: int, kind: str = "JPEG", size: tuple[int, int] = (8, 6)) -> bytes:
    """An image of noise, another one for every number."""
    pixels = np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def members(number: int) -> dict[str, bytes]:
    """The members of sample `number` by file name, as img2dataset writes them."""
    caption = f"picture {number}"
    fields = {
        "caption": caption,
        "url": f"https://example.org/{number}.jpg",
        "key": f"{number:03d}",
        "status": "success",
    }
    return {
        f"{number:03d}.jpg": picture(number),
        f"{number:03d}.txt": caption.encode(),
        f"{number:03d}.json": json.dumps(fields).encode(),
    }


def archive(files: Samples, tar_format: int = tarfile.USTAR_FORMAT, mtime: float = 0) -> bytes:
    """The files as an uncompressed tar, by the standard library."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), mtime
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def header_of(data: bytes, name: str) -> int:
    """Where the header of member `name` begins."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return tar.getmember(name).offset


@pytest.fixture
def three() -> dict[str, bytes]:
    """Nine members of three samples."""
    return {name: data for number in range(3) for name, data in members(number).items()}


@pytest.fixture
def pack_shard(tmp_path: Path) -> Callable[..., Path]:
    """Writes bytes, or files as a tar, under a name in the test's folder."""

    def write(content: bytes | Samples, name: str = "00000.tar") -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else archive(content))
        return path

    return write


@pytest.fixture
def make_archive() -> Callable[..., bytes]:
    return archive


@pytest.fixture
def make_members() -> Callable[[int], dict[str, bytes]]:
    return members


@pytest.fixture
def make_picture() -> Callable[..., bytes]:
    return picture


@pytest.fixture
def find_header() -> Callable[[bytes, str], int]:
    return header_of

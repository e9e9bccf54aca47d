"""Files that exist whole or not at all: temporary name, fsync, rename, fsync of the folder."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

TEMPORARY = ".partial"


def temporary_path(path: Path) -> Path:
    """Where `path` grows until it is whole: same folder (so that the rename is atomic), one name a process."""
    return path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")


def sync_folder(folder: Path) -> None:
    """Makes a rename in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Yields a file to write; it takes the name `path` when the block ends without an error, and vanishes otherwise."""
    temporary = temporary_path(path)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


def write_bytes(path: Path, data: bytes) -> None:
    """Writes `data` under `path`, whole or not at all."""
    with atomic_file(path) as file:
        file.write(data)


def remove_leftovers(folder: Path) -> int:
    """Deletes what a killed writer left in `folder`; returns how many files. Call only while nobody writes there."""
    left = [path for path in folder.glob(f".*{TEMPORARY}") if path.is_file()]
    for path in left:
        path.unlink(missing_ok=True)
    return len(left)

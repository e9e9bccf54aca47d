"""Files of a table: local ones and fsspec URLs, compressed ones, and folders of parts."""

import bz2
import gzip
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec
import pyarrow as pa

from data_pipeline.durable import file_sha256
from data_pipeline.errors import BadDataError, UserError

_KINDS = {
    "csv": "csv", "tsv": "tsv", "tab": "tsv", "txt": "txt", "parquet": "parquet", "pq": "parquet",
    "jsonl": "jsonl", "ndjson": "jsonl",
}  # fmt: skip
_COMPRESSIONS = {"gz": "gzip", "zst": "zstd", "zstd": "zstd", "bz2": "bz2"}


def table_kind(name: Path | str) -> str | None:
    """csv | tsv | txt | parquet | jsonl by the file's name, whatever compresses it; None for anything else."""
    parts = str(name).lower().rpartition("/")[2].split(".")
    if len(parts) > 2 and parts[-1] in _COMPRESSIONS:
        parts.pop()
    return _KINDS.get(parts[-1]) if len(parts) > 1 else None


@dataclass(frozen=True)
class TableFile:
    """One file, by its path or URL. Every method raises UserError where it does not exist."""

    name: str

    @property
    def kind(self) -> str:
        return table_kind(self.name) or ""

    def open(self) -> BinaryIO:
        """Opens the file for reading, decompressed where its name says that it is compressed."""
        file = self.open_raw()
        compression = _COMPRESSIONS.get(self.name.lower().rpartition(".")[2])
        if compression == "gzip":
            return cast(BinaryIO, gzip.GzipFile(fileobj=file))
        if compression == "bz2":
            return cast(BinaryIO, bz2.BZ2File(file))
        if compression == "zstd":
            return cast(BinaryIO, pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd"))
        return file

    def open_raw(self) -> BinaryIO:
        """Opens the file as it lies there."""
        try:
            if is_url(self.name):
                return cast(BinaryIO, fsspec.open(self.name, "rb").open())
            return open(self.name, "rb")
        except FileNotFoundError:
            raise UserError(f"table {self.name} does not exist; check the path") from None
        except UserError:
            raise
        except Exception as error:  # each file system raises errors of its own
            raise BadDataError(
                f"table {self.name} cannot be read: {error}; check the file and its permissions"
            ) from None

    def digest(self) -> str:
        """Hashes a local file whole; of a remote one, what its server says of it (size, ETag, time)."""
        if is_url(self.name):
            system, path = fsspec.core.url_to_fs(self.name)
            about = {key: str(value) for key, value in system.info(path).items()}
            return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        try:
            return file_sha256(Path(self.name))
        except FileNotFoundError:
            raise UserError(f"table {self.name} does not exist; check the path") from None


def is_url(name: str) -> bool:
    """Tells whether `name` is an fsspec URL (`s3://...`, `https://...`)."""
    return "://" in name


def table_files(source: str) -> list[TableFile] | None:
    """Lists the files of a table: one, or the parts in a folder in the order of their names. Names that begin with a
    dot or an underscore are no parts. None where `source` is neither.

    Raises UserError for parts of different kinds.
    """
    if not is_url(source):
        folder = Path(source)
        if not folder.is_dir():
            return [TableFile(source)] if table_kind(source) else None
        names = [str(path) for path in folder.rglob("*") if path.is_file()]
    elif table_kind(source):
        return [TableFile(source)]
    else:
        try:
            system, path = fsspec.core.url_to_fs(source)
            names = [system.unstrip_protocol(name) for name in system.find(path)]
        except Exception as error:  # each file system raises errors of its own
            raise UserError(f"{source} cannot be read ({type(error).__name__}: {error}); check the URL") from None
    parts = sorted(name for name in names if table_kind(name) and name.rpartition("/")[2][0] not in "._")
    kinds = sorted({str(table_kind(name)) for name in parts})
    if len(kinds) > 1:
        raise UserError(f"{source} holds tables of several kinds ({', '.join(kinds)}); give a folder of one kind")
    return [TableFile(name) for name in parts] or None


def identity(files: Sequence[TableFile]) -> dict[str, Any]:
    """Says what tells these files from others, for `plan.json`."""
    if len(files) == 1:
        return {"sha256": files[0].digest()}
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name.rpartition('/')[2]}\0{file.digest()}\0".encode(errors="replace"))
    return {"sha256": digest.hexdigest(), "parts": len(files)}


def text_lines(file: BinaryIO, encoding: str, newline: str) -> io.TextIOWrapper:
    """Opens decoded lines. Bytes that the encoding does not have become lone surrogates where that can be done."""
    return io.TextIOWrapper(file, encoding, errors="surrogateescape", newline=newline)

"""Tells from a path or URL what kind of source it is, and opens it."""

from pathlib import Path

from data_pipeline.errors import UserError
from data_pipeline.preparation.sources.columns import Columns, TableFormat
from data_pipeline.preparation.sources.files import is_url, table_files
from data_pipeline.preparation.sources.folders import Folder, FolderLabels, holds_images
from data_pipeline.preparation.sources.rows import Source
from data_pipeline.preparation.sources.tables import Table

KINDS = "a .csv, .tsv, .jsonl or .parquet table (or one in .gz or .zst, or a folder of parts)"


def open_images(source: str, columns: Columns, format: TableFormat, root: Path | None, labels: FolderLabels) -> Source:
    """Opens what is packed: a folder of images, or a table with paths or with the images themselves.

    A folder is a table where it holds Parquet files and no image.
    """
    folder = None if is_url(source) else Path(source)
    if folder is not None and folder.is_dir() and (holds_images(folder) or not any(folder.rglob("*.parquet"))):
        if columns != Columns():
            raise UserError(f"{source} is a folder: it has no columns; leave the column options out")
        return Folder(folder, labels=labels, max_caption=format.max_caption)
    parts = table_files(source)
    if not parts or (parts[0].kind == "txt" and format.columns is None):
        raise UserError(f"{source} is neither a folder nor {KINDS}; give one of these")
    return Table(parts, columns, format, needs="image", root=root)


def open_urls(source: str, columns: Columns, format: TableFormat) -> Source:
    """Opens what is fetched: a table with a column of URLs, or a text file with one URL a line."""
    parts = table_files(source)
    if not parts:
        raise UserError(f"{source} is no table of URLs; give {KINDS}, or a .txt with one URL a line")
    # A column of local paths may stand beside the URLs.
    return Table(parts, columns, format, needs="url", without=("image",))

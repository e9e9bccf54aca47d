"""A folder of images as a source of rows: every file in it is a row, belongs to one, or is counted as passed over.

captions beside    cat.jpg  cat.txt  cat.json        caption from .txt, else "caption" of .json
classes            cats/1.jpg  dogs/2.jpg            label from the first folder's name
names with dots    a.left.jpg                        a.left.txt, else WebDataset's a.txt
"""

import hashlib
import json
import os
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from data_pipeline.errors import UserError
from data_pipeline.format.image_header import is_image
from data_pipeline.format.index import IMAGE_EXTENSIONS
from data_pipeline.format.reasons import BAD_JSON, TEXT_NOT_UTF8
from data_pipeline.preparation.packing.rules import UNSUPPORTED, no_image_reason
from data_pipeline.preparation.sources.cells import caption_of, text_of
from data_pipeline.preparation.sources.rows import CAPTION_TOO_LONG, TEXT_HAS_NUL, Row, is_text

FolderLabels = Literal["auto", "folders", "none"]

# Why a file of the folder is no row.
HIDDEN = "hidden"
NO_PICTURE = "no_picture"
TEXT_ALONE = "text_without_image"
BROKEN_LINK = "broken_link"
LINK_LOOP = "link_loop"
NO_FILE = "no_plain_file"
UNREADABLE_FOLDER = "folder_unreadable"

_PICTURES = frozenset(IMAGE_EXTENSIONS) | {"heic", "heif", "jxl", "jp2"}  # what nobody can read is a row with a reason
_TEXTS = (".txt", ".json")
_CAPTION_BYTES = 4  # a character in UTF-8, at most


@dataclass(frozen=True)
class _Image:
    """One image and what lies beside it. `parts`: its path below the folder; `size`, `time`: of all its files."""

    path: Path
    parts: tuple[str, ...]
    text: Path | None
    described: Path | None
    state: str

    @property
    def name(self) -> str:
        return "/".join(self.parts)


@dataclass(frozen=True)
class _Survey:
    """What one walk tells. folders: whether they are classes. labelled: whether an image may have a label at all.
    digest: of names, sizes and times."""

    images: int
    folders: bool
    labelled: bool
    digest: str
    passed_over: Counter[str]


class Folder:
    """A `Source` of rows from the images below `folder`, in the order of their relative paths; links are followed.

    labels: "folders" takes the first folder's name as label, "none" does not, "auto" does where every image lies in a
    sub-folder and none has a text beside it
    """

    further = pa.schema([])

    def __init__(self, folder: Path, *, labels: FolderLabels = "auto", max_caption: int = 32_768) -> None:
        self._folder, self._labels, self._max_caption = folder, labels, max_caption

    @cached_property
    def _survey(self) -> "_Survey":
        passed: Counter[str] = Counter()
        digest = hashlib.sha256()
        count, nested, captioned, described = 0, True, False, False
        for image in _walk(self._folder, passed):
            count += 1
            nested &= len(image.parts) > 1
            captioned |= image.text is not None or image.described is not None
            described |= image.described is not None
            digest.update(f"{image.name}\0{image.state}\0".encode(errors="replace"))
        folders = self._labels == "folders" or (self._labels == "auto" and nested and not captioned)
        return _Survey(count, folders, folders or described, digest.hexdigest(), passed)

    def rows(self) -> Iterator[Row]:
        folders = self._survey.folders
        for number, image in enumerate(_walk(self._folder, Counter())):
            label = image.parts[0].encode(errors="replace").decode() if folders and len(image.parts) > 1 else None
            yield self._row(number, image, label)

    def count(self) -> int:
        return self._survey.images

    def labels(self) -> Iterator[object] | None:
        return (row.label for row in self.rows()) if self._survey.labelled else None

    def passed_over(self) -> Mapping[str, int]:
        return dict(self._survey.passed_over.most_common())

    def identity(self) -> dict[str, Any]:
        return {"sha256": self._survey.digest, "labels": self._labels, "max_caption": self._max_caption}

    def describe(self) -> str:
        found = self._survey
        left = ", ".join(f"{number} {reason}" for reason, number in found.passed_over.most_common())
        labels = "the folders" if found.folders else "none or .json"
        said = f"{self._folder}: {found.images:,} images, labels from {labels}"
        return said + (f"; passed over: {left}" if left else "")

    def _row(self, number: int, image: _Image, label: str | None) -> Row:
        """Reads what lies beside an image."""
        caption: str | None = None
        given: object = None
        url: str | None = None
        name = image.name.encode(errors="replace").decode()
        try:
            if image.described is not None:
                fields = json.loads(self._beside(image.described))
                if isinstance(fields, dict):
                    caption, given = caption_of(fields.get("caption"), "first", number), fields.get("label")
                    url = text_of(fields["url"]) if isinstance(fields.get("url"), str) else None
            if image.text is not None:
                caption = text_of(self._beside(image.text).decode("utf-8-sig"))
        except UnicodeDecodeError:
            return Row(number, image.path, url=name, reason=TEXT_NOT_UTF8)
        except (ValueError, RecursionError, OSError):
            return Row(number, image.path, url=name, reason=BAD_JSON)
        texts = [text for text in (caption, url, given) if isinstance(text, str)]
        reason = ""
        if not all(map(is_text, texts)):
            reason = TEXT_NOT_UTF8
        elif any("\0" in text for text in texts):
            reason = TEXT_HAS_NUL
        elif caption is not None and len(caption) > self._max_caption:
            reason = CAPTION_TOO_LONG
        if reason:
            return Row(number, image.path, url=name, reason=reason)
        return Row(number, image.path, caption, given if label is None else label, url or name)

    def _beside(self, path: Path) -> bytes:
        """Reads a small file, a little beyond the longest caption at most."""
        with open(path, "rb") as file:
            return file.read(max(1 << 20, _CAPTION_BYTES * self._max_caption + 4))


def holds_images(folder: Path) -> bool:
    """Tells whether a file below `folder` has the name of an image."""
    return next(_walk(folder, Counter()), None) is not None


def _walk(folder: Path, passed: Counter[str]) -> Iterator[_Image]:
    """Yields the images below `folder` in the order of their relative paths; counts in `passed` what is none."""
    try:
        state = os.stat(folder)
    except OSError as error:
        raise UserError(f"folder {folder} cannot be read: {error.strerror}; check the path") from None
    yield from _descend(folder, (), passed, ((state.st_dev, state.st_ino),))


def _descend(
    folder: Path, parts: tuple[str, ...], passed: Counter[str], above: tuple[tuple[int, int], ...]
) -> Iterator[_Image]:
    """`above`: the folders on the way here, by device and inode, so that a link to one of them is known."""
    try:
        names = os.listdir(folder)
    except OSError:
        passed[UNREADABLE_FOLDER] += 1
        return
    folders: dict[str, os.stat_result] = {}
    files: dict[str, os.stat_result] = {}
    for name in names:
        if name.startswith("."):
            passed[HIDDEN] += 1
            continue
        try:
            state = os.stat(f"{folder}/{name}")
        except OSError:
            passed[BROKEN_LINK] += 1
            continue
        if stat.S_ISREG(state.st_mode):
            files[name] = state
        elif not stat.S_ISDIR(state.st_mode):
            passed[NO_FILE] += 1
        elif (state.st_dev, state.st_ino) in above:
            passed[LINK_LOOP] += 1
        else:
            folders[name] = state
    images = {name for name in files if _is_picture(folder, name, passed)}
    texts = {name for name in files.keys() - images if os.path.splitext(name)[1].lower() in _TEXTS}
    by_name = {name.lower(): name for name in sorted(texts, reverse=True)}
    beside = {name: [by_name.get(_match(name, ending, by_name)) for ending in _TEXTS] for name in images if texts}
    passed[TEXT_ALONE] += len(texts - {text for found in beside.values() for text in found if text is not None})
    if passed[TEXT_ALONE] == 0:
        del passed[TEXT_ALONE]
    in_order = [(name + "/", name) for name in folders]  # so that relative paths come in their order
    for _, name in sorted([*in_order, *((name, name) for name in images)]):
        if name in folders:
            state = folders[name]
            yield from _descend(folder / name, (*parts, name), passed, (*above, (state.st_dev, state.st_ino)))
            continue
        text, described = beside.get(name, (None, None))
        kept = [files[one] for one in (name, text, described) if one is not None]
        yield _Image(
            folder / name,
            (*parts, name),
            None if text is None else folder / text,
            None if described is None else folder / described,
            " ".join(f"{one.st_size}:{one.st_mtime_ns}" for one in kept),
        )


def _match(image: str, ending: str, texts: Mapping[str, str]) -> str:
    """Names the text beside an image: by the image's name without its last ending, else by WebDataset's key, which
    ends at the first dot."""
    whole = (os.path.splitext(image)[0] + ending).lower()
    return whole if whole in texts else (image.partition(".")[0] + ending).lower()


def _is_picture(folder: Path, name: str, passed: Counter[str]) -> bool:
    """Tells whether a file is an image by its name, else by its first bytes; counts it where it is neither that nor a
    text."""
    ending = os.path.splitext(name)[1].lower()
    if ending.lstrip(".") in _PICTURES:
        return True
    if ending in _TEXTS:
        return False
    try:
        with open(folder / name, "rb") as file:
            head = file.read(64)
    except OSError:
        head = b""
    if is_image(head) or no_image_reason(head) == UNSUPPORTED:
        return True
    passed[NO_PICTURE] += 1
    return False

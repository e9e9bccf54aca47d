"""Looks at a shard that anybody made and says what is in it: one sidecar row a sample, damage by reason.

A row is *packed* where the image can be read at its offset. What else is wrong with it stands in `reason`:

    text_missing   it has no caption, the shard's other samples have one     text_empty  its caption is blank
    text_not_utf8  its caption is no UTF-8 (and null in the row)             bad_json    its JSON cannot be read
    label_invalid  its label is no class number (and null in the row)

A row is *rejected* where no image can be had: `image_missing`, `image_empty`, `not_an_image`, `not_a_file` (a link),
`duplicate_key` (the first one stays), or what happened to the archive there (`ustar`: `corrupt_header`, ...).
Damage that hit no sample in particular has a rejected row of its own with an empty key; so has an `empty_shard`, and a
file that is compressed as a whole (`compressed_archive`).
"""

import hashlib
import json
import mmap
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_pipeline.errors import UserError
from data_pipeline.format import sidecar, ustar
from data_pipeline.format.image_header import read_image_header
from data_pipeline.format.labels import LABEL_INVALID, InvalidLabelError, read_label
from data_pipeline.format.reasons import (
    BAD_JSON,
    COMPRESSED,
    DUPLICATE_KEY,
    EMPTY_IMAGE,
    EMPTY_SHARD,
    EMPTY_TEXT,
    MISSING_TEXT,
    NO_IMAGE,
    NOT_A_FILE,
    NOT_AN_IMAGE,
    TEXT_NOT_UTF8,
)
from data_pipeline.format.ustar import Damage, TarMember

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jfif", "jpe")

ANNOTATION_MEMBERS = ("objects.json", "labels.png")  # of annotated pictures, after the key

_COMPRESSED = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ\0")

# WebDataset's rule: the key ends at the first dot of the file name; names that begin with a dot are no samples.
_NAME = re.compile(r"^((?:.*/|)[^./][^./]*)[.]([^/]*)$", re.DOTALL)


@dataclass
class _Sample:
    key: str
    members: dict[str, TarMember] = field(default_factory=dict)
    damage: str = ""
    duplicate: bool = False

    def image(self) -> TarMember | None:
        """Returns the image member: `KEY.jpg` first, else the only `KEY.something.jpg`."""
        for extension in IMAGE_EXTENSIONS:
            if extension in self.members:
                return self.members[extension]
        nested = [
            member
            for name, member in self.members.items()
            if name.rpartition(".")[2] in IMAGE_EXTENSIONS and name not in ANNOTATION_MEMBERS
        ]
        return nested[0] if len(nested) == 1 else None


def index_shard(path: Path) -> pa.Table:
    """Returns rows of `sidecar.SIDECAR_SCHEMA` for a WebDataset tar; `row` counts the shard's samples from 0.

    Raises UserError where the file cannot be opened. Whatever is wrong inside it is recorded, never raised.
    """
    try:
        with open(path, "rb") as file:
            if path.stat().st_size == 0:
                return _table([_damage_row(EMPTY_SHARD)])
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
                return _table(list(_rows(buffer)))
    except OSError as error:
        raise UserError(f"shard {path} cannot be read: {error.strerror}; check the path and its permissions") from None


def _rows(buffer: mmap.mmap) -> Iterator[dict[str, Any]]:
    if buffer[:6].startswith(_COMPRESSED):
        yield _damage_row(COMPRESSED)
        return
    samples, damages = _gather(buffer)
    described = [_describe(sample, buffer) for sample in samples]
    # A set of labelled or bare images lacks no text; a shard where others have a caption does.
    captioned = any(row["caption"] is not None for row in described)
    for row in described:
        noted = row["reason"] not in ("", LABEL_INVALID)
        if captioned and row["caption"] is None and row["status"] == sidecar.PACKED and not noted:
            row["reason"] = MISSING_TEXT
    yield from described
    if not any(row["status"] == sidecar.PACKED for row in described):
        damages = [*damages, EMPTY_SHARD]
    for reason in damages:
        yield _damage_row(reason)


def _gather(buffer: mmap.mmap) -> tuple[list[_Sample], list[str]]:
    """Returns members by sample, in order of first appearance, and the damage that belongs to no sample."""
    samples: list[_Sample] = []
    by_key: dict[str, _Sample] = {}
    lost: list[tuple[str, int]] = []  # damage without a name, and how many samples stood before it
    for event in ustar.walk(buffer):
        match = _NAME.match(event.name)
        if match is None:
            if isinstance(event, Damage):
                lost.append((event.reason, len(samples)))
            continue
        key, extension = match[1], match[2].lower()
        if key.startswith("__") or (isinstance(event, TarMember) and event.kind == b"5"):
            continue
        sample = samples[-1] if samples and samples[-1].key == key else by_key.get(key)
        if sample is None or (isinstance(event, TarMember) and extension in sample.members):
            sample = _Sample(key, duplicate=sample is not None)
            samples.append(sample)
            by_key.setdefault(key, sample)
        if isinstance(event, Damage):
            if extension.rpartition(".")[2] in IMAGE_EXTENSIONS:
                sample.damage = event.reason
            else:
                lost.append((event.reason, -1))
        else:
            sample.members[extension] = event
    damages = []
    for reason, before in lost:
        # A lost header explains the sample next to it that has no image.
        beside = [samples[i] for i in (before - 1, before) if before >= 0 and 0 <= i < len(samples)]
        bare = next((sample for sample in beside if sample.image() is None and not sample.damage), None)
        if bare is None:
            damages.append(reason)
        else:
            bare.damage = reason
    return samples, damages


def _describe(sample: _Sample, buffer: mmap.mmap) -> dict[str, Any]:
    image, text, metadata = sample.image(), sample.members.get("txt"), sample.members.get("json")
    caption, lacking = _caption(text, buffer)
    fields: dict[str, Any] = {}
    if metadata is not None:
        try:
            loaded = json.loads(buffer[metadata.offset : metadata.offset + metadata.size])
            fields = loaded if isinstance(loaded, dict) else {}
        except (ValueError, RecursionError):
            lacking = lacking or BAD_JSON
    if text is None and isinstance(fields.get("caption"), str):
        caption = _clean(fields["caption"]) or None
    row: dict[str, Any] = {
        "status": sidecar.REJECTED,
        "reason": "",
        "key": _clean(sample.key),
        "url": _clean(fields["url"]) if isinstance(fields.get("url"), str) else None,
        "caption": caption,
    }
    try:
        row["label"] = _label(fields, sample.members.get("cls"), buffer)
    except InvalidLabelError:
        lacking = lacking or LABEL_INVALID
    annotation = next((name for name in ANNOTATION_MEMBERS if name in sample.members), None)
    if annotation is not None:
        lies = sample.members[annotation]
        digest = hashlib.sha256(buffer[lies.offset : lies.offset + lies.size]).hexdigest()
        row |= {"annotation_member": annotation, "annotation_sha256": digest}
    known = (("image", image), ("text", text), ("json", metadata), ("annotation", sample.members.get(annotation or "")))
    for name, member in known:
        if member is not None:
            row |= {f"{name}_offset": member.offset, f"{name}_size": member.size}
    if sample.duplicate:
        return row | {"reason": DUPLICATE_KEY}
    if image is None:
        return row | {"reason": sample.damage or NO_IMAGE}
    if image.kind not in (b"0", b"7"):
        return row | {"reason": NOT_A_FILE}
    if image.size == 0:
        return row | {"reason": EMPTY_IMAGE}
    data = buffer[image.offset : image.offset + image.size]
    header = read_image_header(data)
    if header is None:
        return row | {"reason": NOT_AN_IMAGE}
    row |= {"image_format": header.format, "width": header.width, "height": header.height}
    return row | {"status": sidecar.PACKED, "reason": lacking, "sha256": hashlib.sha256(data).hexdigest()}


def _caption(text: TarMember | None, buffer: mmap.mmap) -> tuple[str | None, str]:
    """Returns the caption, and the reason where the caption is bad."""
    if text is None:
        return None, ""
    try:
        caption = buffer[text.offset : text.offset + text.size].decode("utf-8")
    except UnicodeDecodeError:
        return None, TEXT_NOT_UTF8
    return (caption, "") if caption.strip() else (None, EMPTY_TEXT)


def _label(fields: dict[str, Any], member: TarMember | None, buffer: mmap.mmap) -> int | None:
    """Returns the category number, from the JSON's `label` or from WebDataset's `KEY.cls`.

    Raises InvalidLabelError for what is no number: names have no numbers without a list of the classes.
    """
    label = fields.get("label")
    if label is None and member is not None:
        label = buffer[member.offset : member.offset + min(member.size, 64)].decode("utf-8", "replace")
    found = read_label(label)
    if isinstance(found, str):
        raise InvalidLabelError(f"{found!r} is no number")
    return found


def _clean(text: str) -> str:
    """Makes text valid UTF-8, as Parquet needs; file names and escaped JSON may be anything."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _damage_row(reason: str) -> dict[str, Any]:
    return {"status": sidecar.REJECTED, "reason": reason, "key": ""}


def _table(rows: list[dict[str, Any]]) -> pa.Table:
    return sidecar.table({**row, "row": number} for number, row in enumerate(rows))

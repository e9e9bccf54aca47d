"""Prepares one input row: reads its image, compares the digest that is expected, and brings the image into its form."""

import os
import stat
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from data_pipeline.format.reasons import NO_IMAGE
from data_pipeline.preparation.packing.checking import Checked, checked
from data_pipeline.preparation.packing.rules import ImageRules, Refused
from data_pipeline.preparation.packing.samples import Sample
from data_pipeline.preparation.sources.rows import Row

UNREADABLE = "image_unreadable"
NO_PLAIN_FILE = "not_a_file"
TOO_LARGE = "too_large"
NO_CAPTION = "caption_missing"

Captionless = Literal["keep", "reject", "empty"]


def pack_row(row: Row, rules: ImageRules, captionless: Captionless = "keep") -> Sample:
    """Prepares one input row, whose label is a class number by now."""
    sample = sample_of(row, captionless)
    if sample.reason:
        return sample
    if row.image is None:
        return replace(sample, reason=NO_IMAGE)
    found = row.image if isinstance(row.image, bytes) else read_image(row.image, rules.max_bytes)
    if isinstance(found, str):
        return replace(sample, reason=found)
    return with_data(sample, found, row.expected, rules)


def read_image(path: Path, max_bytes: int) -> bytes | str:
    """Reads a file, no more of it than `max_bytes`; returns the reason where there is nothing to read. What is no plain
    file (a pipe, a device) is not waited for."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return NO_IMAGE
    except (OSError, ValueError):  # permissions, a name with a NUL, too many links
        return UNREADABLE
    try:
        with open(handle, "rb") as file:
            state = os.fstat(handle)
            if not stat.S_ISREG(state.st_mode):
                return NO_PLAIN_FILE
            # Asked for 100 MB, Python makes room for 100 MB. Files of /proc say that they are empty.
            data = file.read(min(state.st_size or max_bytes, max_bytes) + 1)
    except IsADirectoryError:
        return NO_PLAIN_FILE
    except OSError:
        return UNREADABLE
    return data if len(data) <= max_bytes else TOO_LARGE


def sample_of(row: Row, captionless: Captionless = "keep") -> Sample:
    """Makes the sample of a row, without its image."""
    label = row.label if isinstance(row.label, int) else None
    reason = row.reason or (NO_CAPTION if captionless == "reject" and row.caption is None else "")
    return Sample(
        row=row.number,
        caption=row.caption,
        label=label,
        url=row.url,
        reason=reason,
        further=row.further,
        empty_text=captionless == "empty" and row.caption is None,
        place=row.place,
    )


def with_data(sample: Sample, data: bytes, expected: str | None, rules: ImageRules) -> Sample:
    """Adds an image from a file's bytes, or the reason why there is none. expected: the digest that they must have."""
    return with_image(sample, checked(data, expected, rules))


def with_image(sample: Sample, made: Checked | Refused, fields: Mapping[str, Any] | None = None) -> Sample:
    """Adds an image and fields of its JSON member, or the reason why there is no image."""
    if isinstance(made, Refused):
        return replace(sample, reason=made.reason, width=made.width, height=made.height)
    image = made.image
    return replace(
        sample,
        image=image.data,
        extension=image.extension,
        format=image.format,
        width=image.width,
        height=image.height,
        reason=sample.reason or image.note,
        fields=fields or sample.fields,
        pdq=image.pdq,
        sha256=made.sha256,
    )

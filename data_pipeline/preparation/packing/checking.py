"""From the bytes of a file to an image as it will stand in the shard, with digests of both.

A process that decodes for another one loads no more than this, no Parquet and no HTTP client; the other one loads no
decoder.
"""

import hashlib
from typing import NamedTuple

from data_pipeline.preparation.packing.rules import ImageRules, Prepared, Refused

HASH_MISMATCH = "hash_mismatch"
_ALGORITHMS = {32: "md5", 40: "sha1", 64: "sha256"}  # by the number of hexadecimal digits


class Checked(NamedTuple):
    """An image, and its SHA-256 as it will stand in the shard."""

    image: Prepared
    sha256: str


def checked(data: bytes, expected: str | None, rules: ImageRules) -> Checked | Refused:
    """Prepares an image. expected: the digest that `data` must have."""
    from data_pipeline.preparation.packing import images

    digest = ""
    if expected is not None:
        digest = hashlib.new(_ALGORITHMS[len(expected)], data).hexdigest()
        if digest != expected:
            return Refused(HASH_MISMATCH)
    made = images.prepare(data, rules)
    if isinstance(made, Refused):
        return made
    known = made.data is data and len(digest) == 64
    return Checked(made, digest if known else hashlib.sha256(made.data).hexdigest())


def checked_fetched(item: tuple[bytes, str | None], *, rules: ImageRules) -> Checked | Refused:
    """Does what `checked` does, of one argument that other processes are sent."""
    return checked(*item, rules)

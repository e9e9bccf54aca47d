"""The perceptual hash of an encoded image: one function for packing and for curation."""

from data_pipeline.format.pdq import MOST_PIXELS_A_SIDE, Pdq, pdq
from data_pipeline.reading.decode.pixels import BadSample, can_reduce, decode, read_header

_MAX_PIXELS = 178_956_970


def hash_image(data: bytes) -> Pdq | None:
    """Hashes an encoded image, decoded no larger than needed; None for one that cannot be decoded."""
    try:
        header = read_header(data, _MAX_PIXELS)
        reduce = 1
        while can_reduce(header) and reduce < 8 and min(header.width, header.height) >= 2 * reduce * MOST_PIXELS_A_SIDE:
            reduce *= 2
        return pdq(decode(data, header, reduce))
    except BadSample:
        return None

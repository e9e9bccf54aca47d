"""Makes Arrow columns of Python values, and names what a damaged Parquet file raises.

`pyarrow.array` loads pandas wherever that is installed, which takes every process that writes a sidecar a fifth of a
second. Text and integers, all that most sidecars hold, are laid out here as Arrow's format has them; the rest it makes.
"""

from array import array
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow as pa

PARQUET_ERRORS = (pa.ArrowException, OSError, UnicodeDecodeError)  # the last for names of columns

_INTEGERS = {pa.int32(): "i", pa.int64(): "q"}
_MOST_BYTES = 2**31 - 1  # of the text of one column: offsets are 32-bit


def column(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """Makes a column; None is null. Raises TypeError, ValueError or OverflowError for what is not of this kind."""
    if kind in _INTEGERS:
        numbers = array(_INTEGERS[kind], [0 if value is None else value for value in values])
        return pa.Array.from_buffers(kind, len(values), [_validity(values), pa.py_buffer(numbers)])
    if kind == pa.string():
        texts = [b"" if value is None else str.encode(value) for value in values]
        ends = list(accumulate(map(len, texts), initial=0))
        if ends[-1] <= _MOST_BYTES:
            buffers = [_validity(values), pa.py_buffer(array("i", ends)), pa.py_buffer(b"".join(texts))]
            return pa.Array.from_buffers(kind, len(values), buffers)
    return pa.array(values, type=kind)


def _validity(values: Sequence[Any]) -> pa.Buffer | None:
    """Returns one bit a value, none where no value is null."""
    known = [value is not None for value in values]
    return None if all(known) else pa.py_buffer(np.packbits(known, bitorder="little"))

"""Arrow columns that are laid out by hand, beside those that pyarrow makes."""

import subprocess
import sys
from typing import Any

import pyarrow as pa
import pytest

from data_pipeline.format.columns import column

COLUMNS: list[tuple[list[Any], pa.DataType]] = [
    ([], pa.int64()),
    ([], pa.string()),
    ([1, None, -3], pa.int32()),
    ([2**62, *range(16), None], pa.int64()),
    (["a", "ä\0", None, ""], pa.string()),
    ([None] * 9, pa.string()),
    ([1.5, None], pa.float64()),
    ([["a"], None, []], pa.list_(pa.string())),
]


@pytest.mark.parametrize(("values", "kind"), COLUMNS)
def test_columns_are_those_that_pyarrow_makes(values: list[Any], kind: pa.DataType) -> None:
    made = column(values, kind)
    made.validate(full=True)
    assert made.equals(pa.array(values, type=kind))


@pytest.mark.parametrize(
    ("value", "kind"),
    [("1", pa.int64()), (1.5, pa.int64()), (2**40, pa.int32()), (b"x", pa.string()), ("\udcff", pa.string())],
)
def test_what_is_of_another_kind_is_an_error(value: object, kind: pa.DataType) -> None:
    with pytest.raises((TypeError, ValueError, OverflowError)):
        column([value], kind)


def test_a_sidecar_is_made_without_pandas() -> None:
    code = "import sys; from data_pipeline.format import sidecar; sidecar.table([{'row': 1, 'key': 'a'}]); "
    subprocess.run([sys.executable, "-c", code + "sys.exit('pandas' in sys.modules)"], check=True)

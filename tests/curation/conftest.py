"""Sets of small pictures, made by the product's own `pack`."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.preparation import pack

sys.path.insert(0, str(Path(__file__).parent))  # for curation_sets


@pytest.fixture
def make_set(tmp_path: Path) -> Callable[..., Path]:
    """make_set("name", images, captions=..., urls=..., rows_per_shard=...) -> its folder; None is a missing image."""

    def make(name: str, images: list[bytes | None], rows_per_shard: int = 8, **columns: list[Any]) -> Path:
        rows = {
            "image": pa.array(images, pa.binary()),
            "caption": columns.get("captions", [f"picture number {n}" for n in range(len(images))]),
            "url": columns.get("urls", [f"https://{name}.invalid/{n}" for n in range(len(images))]),
        }
        table = tmp_path / f"{name}.parquet"
        pq.write_table(pa.table(rows), table)
        pack(table, tmp_path / name, rows_per_shard=rows_per_shard, workers=1)
        return tmp_path / name

    return make

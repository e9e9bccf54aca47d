"""Sets of small pictures, made by the product's own `pack`."""

import functools
import http.server
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
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


@pytest.fixture
def site_of() -> Iterator[Callable[[Path], str]]:
    """site_of(folder) -> the address of a web server on this machine that has the folder's files."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with ExitStack() as running:

        def serve(folder: Path) -> str:
            handler = functools.partial(Quiet, directory=str(folder))
            server = running.enter_context(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
            threading.Thread(target=server.serve_forever, daemon=True).start()
            running.callback(server.shutdown)
            return f"http://127.0.0.1:{server.server_port}"

        yield serve

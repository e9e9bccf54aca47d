"""HTML pages of pictures: one file that needs nothing besides itself."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageOps

from data_pipeline.durable import write_durably
from data_pipeline.format import Manifest, read_sidecar
from data_pipeline.format.opaque import opaque

_SIDE = 160  # pixels of a thumbnail's longer side
_STYLE = """
body { font: 14px system-ui, sans-serif; margin: 2rem; color: #1b1f24; background: #fff; }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem }
.sheet { display: flex; flex-wrap: wrap; gap: 12px }
figure { width: 170px; margin: 0; font-size: 12px } img { max-width: 160px; max-height: 160px; display: block }
figure b { color: #a40e26; font-weight: 600 } figcaption { overflow-wrap: anywhere; max-height: 9em; overflow: hidden }
.none { width: 160px; height: 60px; background: #eee; color: #666; text-align: center; line-height: 60px }
.pair { border: 1px solid #d0d7de; padding: 6px; display: flex; gap: 8px }
table { border-collapse: collapse } td, th { padding: 3px 10px; text-align: right; border-bottom: 1px solid #eee }
td:first-child, th:first-child { text-align: left }
"""


class Picture(NamedTuple):
    """A row to show: which one, and what is said below it."""

    set: int
    shard: int
    place: int  # in the sidecar
    reason: str = ""
    caption: str | None = None
    url: str | None = None


def contact_sheet(
    path: Path, title: str, sets: Sequence[Manifest], groups: Mapping[str, Sequence[Picture | tuple[Picture, Picture]]]
) -> None:
    """Writes a page of thumbnails, group by group; a pair stands side by side. A picture without bytes says so."""
    body = []
    for name, pictures in groups.items():
        figures = [
            f'<div class="pair">{"".join(_figure(sets, one) for one in picture)}</div>'
            if not isinstance(picture, Picture)
            else _figure(sets, picture)
            for picture in pictures
        ]
        body.append(f"<h2>{html.escape(name)} ({len(pictures)} shown)</h2><div class=sheet>{''.join(figures)}</div>")
    write_page(path, title, "".join(body))


def write_page(path: Path, title: str, body: str) -> None:
    head = f"<meta charset=utf-8><title>{html.escape(title)}</title><style>{_STYLE}</style>"
    write_durably(path, f"<!doctype html><html lang=en>{head}<h1>{html.escape(title)}</h1>{body}</html>\n")


def _figure(sets: Sequence[Manifest], picture: Picture) -> str:
    one = sets[picture.set]
    entry = one.shards[picture.shard]
    row = read_sidecar(one.sidecar_path(entry)).slice(picture.place, 1).to_pylist()[0]
    image = '<div class="none">no picture</div>'
    if row["image_offset"] is not None and row["status"] not in ("rejected", "erased"):
        with suppress(FileNotFoundError), open(one.shard_path(entry), "rb") as file:  # sent away by `--tars-to`
            file.seek(row["image_offset"])
            image = _thumbnail(file.read(row["image_size"]))
    said = [f"<b>{html.escape(picture.reason)}</b><br>"] if picture.reason else []
    said.append(html.escape((picture.caption or "")[:300]))
    if picture.url:
        said.append(f"<br><small>{html.escape(picture.url[:120])}</small>")
    place = html.escape(f"{one.name}/{row['key']}")
    return f"<figure>{image}<figcaption>{''.join(said)}<br><small>{place}</small></figcaption></figure>"


def _thumbnail(data: bytes) -> str:
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.draft("RGB", (2 * _SIDE, 2 * _SIDE))
            small = opaque(ImageOps.exif_transpose(image))
            small.thumbnail((_SIDE, _SIDE))
    except Exception:  # decoders raise many kinds of errors on damaged bytes; the page shows the gap
        return '<div class="none">not readable</div>'
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return f'<img src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}" alt="">'

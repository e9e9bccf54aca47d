"""A set is a folder with `manifest.json`, written last: a shard that the manifest does not name does not exist.

SET/manifest.json     {"schema": 1, "name", "samples", "classes"?, "about"?, "history"?, "shards": [...]}
    manifest.former   in its place while shards are being written anew: `history` and `about` outlive that
    00000.tar         members KEY.jpg|png|webp, KEY.txt, KEY.json
    00000.parquet     the sidecar: one row an input row
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_pipeline.durable import write_durably
from data_pipeline.errors import BadDataError, UserError

SET_MANIFEST = "manifest.json"
AWAY = ".away"  # in place of `.tar`: the digest of a tar that lies on object storage
COMMIT = ".commit"  # 00000.commit: the files of a shard are being put in place
FORMER = "manifest.former"
VERSION = 1


@dataclass(frozen=True)
class ShardEntry:
    """One shard of a set. `sha256` is that of the whole tar file.

    samples: its slots, used or not. laid_out: `sha256` when the samples were written, where erasing bytes has since
    changed it. The order of samples depends on this one.
    """

    name: str
    sidecar: str
    samples: int
    bytes: int
    sha256: str
    laid_out: str = ""

    @property
    def slots(self) -> str:
        """Names which samples stand at which places, whether or not they are still used."""
        return self.laid_out or self.sha256

    def as_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value != ""}


@dataclass(frozen=True)
class Manifest:
    """A set of shards. Sidecars lie in `index_folder`, which is `folder` unless the shards were indexed elsewhere."""

    folder: Path
    name: str
    classes: tuple[str, ...] | None
    shards: tuple[ShardEntry, ...]
    samples: int
    index_folder: Path
    about: Mapping[str, Any] = field(default_factory=dict)
    history: tuple[Mapping[str, Any], ...] = ()  # what curation has done, oldest first

    @property
    def revision(self) -> str:
        """Changes with every decision about rows, as sidecars do while the shards stay."""
        return hashlib.sha256(json.dumps(self.history).encode()).hexdigest() if self.history else ""

    def shard_path(self, entry: ShardEntry) -> Path:
        return self.folder / entry.name

    def sidecar_path(self, entry: ShardEntry) -> Path:
        return self.index_folder / entry.sidecar


def write_manifest(
    folder: Path,
    *,
    name: str,
    shards: Sequence[ShardEntry],
    classes: Sequence[str] | None = None,
    about: Mapping[str, Any] | None = None,
    history: Sequence[Mapping[str, Any]] | None = None,
) -> Manifest:
    """Writes `folder/manifest.json`. Call this last, when every shard and sidecar is in place.

    `about` and `history` stay what they were where they are not given.
    """
    former = _kept(folder)
    about = former.get("about") if about is None else about
    history = former.get("history") if history is None else history
    content: dict[str, Any] = {"schema": VERSION, "name": name, "samples": sum(shard.samples for shard in shards)}
    if classes is not None:
        content["classes"] = list(classes)
    if about:
        content["about"] = dict(about)
    if history:
        content["history"] = [dict(step) for step in history]
    content["shards"] = [shard.as_json() for shard in shards]
    write_durably(folder / SET_MANIFEST, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
    (folder / FORMER).unlink(missing_ok=True)
    return read_manifest(folder)


def withdraw_manifest(folder: Path) -> None:
    """Takes the manifest away before a shard is changed; the next `write_manifest` goes on with its history."""
    with suppress(FileNotFoundError):
        os.replace(folder / SET_MANIFEST, folder / FORMER)


def _kept(folder: Path) -> Mapping[str, Any]:
    for name in (SET_MANIFEST, FORMER):
        with suppress(OSError, ValueError):
            content = json.loads((folder / name).read_bytes())
            return content if isinstance(content, dict) else {}
    return {}


def read_manifest(folder: Path | str) -> Manifest:
    """Reads the set in `folder`. Raises UserError where there is none, BadDataError where its manifest is damaged."""
    folder = Path(folder)
    path = folder / SET_MANIFEST
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        what = f"{path} is missing" if folder.is_dir() else f"shard folder {folder} does not exist"
        raise UserError(f"{what}; check the path, or index the shards with `internimage shards index`") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; check the path and its permissions") from None
    return parse_manifest(text, folder, where=str(path))


def parse_manifest(text: bytes, folder: Path, *, where: str, index_folder: Path | None = None) -> Manifest:
    """Parses a manifest, for shards in `folder` and sidecars in `index_folder` (default: `folder`)."""
    remedy = "make it anew with `internimage shards index --force`"
    try:
        content = json.loads(text)
        if content["schema"] != VERSION:
            raise BadDataError(
                f"{where} has schema {content['schema']}, this version reads {VERSION}; "
                "read it with the version that wrote it, or index the shards again"
            )
        shards = tuple(
            ShardEntry(
                _plain(shard["name"]),
                _plain(shard["sidecar"]),
                int(shard["samples"]),
                int(shard["bytes"]),
                str(shard["sha256"]),
                str(shard.get("laid_out", "")),
            )
            for shard in content["shards"]
        )
        classes = content.get("classes")
        manifest = Manifest(
            folder=folder,
            name=str(content["name"]),
            classes=None if classes is None else tuple(str(name) for name in classes),
            shards=shards,
            samples=int(content["samples"]),
            index_folder=folder if index_folder is None else index_folder,
            about=content.get("about", {}),
            history=tuple(dict(step) for step in content.get("history", ())),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadDataError(f"{where} is damaged ({type(error).__name__}: {error}); {remedy}") from None
    if manifest.samples != sum(shard.samples for shard in shards):
        raise BadDataError(
            f"{where} counts {manifest.samples} samples, its shards {sum(s.samples for s in shards)}; {remedy}"
        )
    return manifest


def _plain(name: str) -> str:
    """Checks that a name has no folders: a manifest from elsewhere must not lead out of its folder."""
    if not name or "/" in name or name in (".", ".."):  # Path would take half a second for 42,700 shards
        raise ValueError(f"{name!r} is not a plain file name")
    return name

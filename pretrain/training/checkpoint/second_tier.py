"""Copies of checkpoints elsewhere: a durable folder beside a fast one, or object storage, by fsspec.

    RUN/checkpoints/step-00001000  --after it is complete, in the background-->  COPY_TO/step-00001000

A copy is complete when its manifest is there, which is written last, as on the disk. Where the newest complete copy is
newer than what the run's own folder has, or that is damaged, it is fetched. A copy that fails is an event, and the run
goes on.
"""

import json
import threading
from pathlib import Path

import fsspec

from data_pipeline.durable import sync_folder, write_durably
from pretrain.training.checkpoint.disk import FOLDER, LATEST, MANIFEST, WRITING, Checkpoint, DamagedError
from pretrain.training.logging.kinds import EventKind
from pretrain.training.logging.record import EventLog


class SecondTier:
    """The leader's. url: a folder, or whatever fsspec knows, as s3://bucket/runs/h. keep: newest copies that stay."""

    def __init__(self, url: str, report: EventLog, keep: int | None = None) -> None:
        self._files, self._root = fsspec.core.url_to_fs(url)
        self._url, self._report, self._keep = url, report, keep
        self._thread: threading.Thread | None = None
        self._next: Checkpoint | None = None
        self._lock = threading.Lock()

    def offer(self, checkpoint: Checkpoint) -> None:
        """Copy it, after the copy under way; of several that wait the newest is copied."""
        with self._lock:
            self._next = checkpoint
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="second tier", daemon=True)
                self._thread.start()

    def finish(self) -> None:
        """Wait until nothing is under way."""
        while (thread := self._thread) is not None:
            thread.join()

    def _work(self) -> None:
        while True:
            with self._lock:
                checkpoint, self._next = self._next, None
                if checkpoint is None:
                    self._thread = None
                    return
            try:
                self._copy(checkpoint)
            except Exception as error:  # of any file system; the checkpoint itself is safe
                self._report(EventKind.COPY_FAILED, step=checkpoint.step, message=f"{self._url}: {error}")
            else:
                self._report(EventKind.COPIED, step=checkpoint.step, to=self._url)

    def _copy(self, checkpoint: Checkpoint) -> None:
        target = f"{self._root}/{checkpoint.path.name}"
        manifest = f"{target}/{MANIFEST}"
        if self._files.exists(manifest) and self._files.size(manifest) == (checkpoint.path / MANIFEST).stat().st_size:
            return
        self._files.makedirs(target, exist_ok=True)
        for name in (*checkpoint.manifest["files"], MANIFEST):
            self._files.put_file(str(checkpoint.path / name), f"{target}/{name}")

        for old in self._complete()[self._keep :] if self._keep is not None else ():
            self._remove(old)

    def fetch_newest(self, run: Path, beyond: int = -1) -> str | None:
        """Bring the newest complete copy of more than `beyond` steps into the run's folder; its name, or None.

        A copy that cannot be read is passed over, with an event.
        """
        names = [name for name in self._complete() if Checkpoint(Path(name)).step > beyond]
        return next((name for name in names if self.fetch(run, name)), None)

    def fetch(self, run: Path, name: str) -> bool:
        """Bring one copy into the run's folder, under its name once it is whole. False where there is none, or, with an
        event, where it cannot be read.
        """
        folder, source = run / FOLDER, f"{self._root}/{name}"
        temporary = folder / f"{WRITING}{name}"
        try:
            if not self._files.exists(f"{source}/{MANIFEST}"):
                return False
            temporary.mkdir(parents=True, exist_ok=True)
            for file in (*json.loads(self._files.cat_file(f"{source}/{MANIFEST}"))["files"], MANIFEST):
                self._files.get_file(f"{source}/{file}", str(temporary / file))
            Checkpoint(temporary).verify()
        except (OSError, ValueError, KeyError, DamagedError) as error:
            self._report(EventKind.COPY_FAILED, message=f"{self._url}: {name} cannot be fetched: {error}")
            return False
        temporary.rename(folder / name)
        write_durably(folder / LATEST, name)
        sync_folder(folder)
        return True

    def drop_beyond(self, step: int) -> None:
        """The run went back to `step`: copies of the line that it left must not be fetched."""
        self.finish()
        for name in self._complete():
            if Checkpoint(Path(name)).step > step:
                self._remove(name)

    def _complete(self) -> list[str]:
        """Names of the copies that have a manifest, newest first."""
        found = self._files.glob(f"{self._root}/step-*/{MANIFEST}") if self._files.exists(self._root) else []
        return sorted((str(path).split("/")[-2] for path in found), reverse=True)

    def _remove(self, name: str) -> None:
        """The manifest first: half a copy is no copy."""
        try:
            self._files.rm_file(f"{self._root}/{name}/{MANIFEST}")
            self._files.rm(f"{self._root}/{name}", recursive=True)
        except OSError as error:
            self._report(EventKind.COPY_FAILED, message=f"{self._url}: {name} cannot be removed: {error}")

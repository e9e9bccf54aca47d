"""Copies of checkpoints elsewhere: a durable folder beside a fast one, or object storage, by fsspec.

    RUN/checkpoints/step-00001000  --after it is complete, in the background-->  COPY_TO/step-00001000
                    run-id                                                               run-id

A copy is complete when its manifest is there, which is written last, as on the disk. Where the newest complete copy is
newer than what the run's own folder has, or that is damaged, it is fetched. A copy that fails is an event, and the run
goes on. Copies are of one run: `claim` refuses those of another one, which would be resumed in its place.
"""

import json
import threading
from pathlib import Path

import fsspec
import yaml

from data_pipeline.durable import sync_folder, write_durably
from data_pipeline.errors import UserError, first_ten
from pretrain.configuration import RunConfig, parse_config
from pretrain.training.checkpoint.disk import CONFIG, FOLDER, LATEST, MANIFEST, WRITING, Checkpoint, DamagedError
from pretrain.training.checkpoint.identity import IDENTITY, give_identity, known_identity
from pretrain.training.logging.kinds import EventKind
from pretrain.training.logging.record import EventLog
from pretrain.training.resume import changed_keys


def claim(url: str, run: Path, config: RunConfig) -> None:
    """Tie the copies at `url` to the run. A run whose folder is gone is known by the configuration of its newest copy.

    A place that cannot be reached now is left to the copies, whose failures are events. Raises UserError where the
    copies are another run's.
    """
    try:
        files, root = fsspec.core.url_to_fs(url)
        owner = _owner(files, root)
        configs = (f"{root}/{name}/{CONFIG}" for name in _complete(files, root))
        newest = next((path for path in configs if files.exists(path)), None)
        text = files.cat_file(newest) if newest is not None else None
    except Exception:  # of any file system
        return
    mine = known_identity(run)
    if mine is None and text is not None:
        _, refused = changed_keys(parse_config(yaml.safe_load(text), f"{url}: {newest}"), config)
        if refused:
            raise UserError(
                f"checkpoint.copy_to: {url} holds copies of another run, which differs in {first_ten(refused)}; give "
                "each run a place of its own"
            )
        if owner is not None:
            give_identity(run, owner)
    elif owner is not None and owner != mine:
        raise UserError(
            f"checkpoint.copy_to: {url} is another run's ({owner} in its {IDENTITY}, {mine or 'none'} in "
            f"{run / FOLDER}); give each run a place of its own, or delete that {IDENTITY} where the other is given up"
        )


def _owner(files: fsspec.AbstractFileSystem, root: str) -> str | None:
    path = f"{root}/{IDENTITY}"
    return files.cat_file(path).decode().strip() if files.exists(path) else None


def _complete(files: fsspec.AbstractFileSystem, root: str) -> list[str]:
    """Names of the copies that have a manifest, newest first."""
    found = files.glob(f"{root}/step-*/{MANIFEST}") if files.exists(root) else []
    return sorted((str(path).split("/")[-2] for path in found), reverse=True)


class SecondTier:
    """The leader's. url: a folder, or whatever fsspec knows, as s3://bucket/runs/h. identity: of the run. keep: newest
    copies that stay.
    """

    def __init__(self, url: str, report: EventLog, identity: str, keep: int | None = None) -> None:
        self._files, self._root = fsspec.core.url_to_fs(url)
        self._identity = identity
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

    def finish(self, seconds: float | None = None) -> bool:
        """Wait until nothing is under way, at most for `seconds` a copy; whether nothing is."""
        while (thread := self._thread) is not None:
            thread.join(seconds)
            if thread.is_alive():
                return False
        return True

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
        owner = _owner(self._files, self._root)
        if owner is None:
            self._files.makedirs(self._root, exist_ok=True)
            self._files.pipe_file(f"{self._root}/{IDENTITY}", self._identity.encode())
        elif owner != self._identity:
            raise OSError(f"is another run's ({owner} in its {IDENTITY}); give each run a place of its own")
        target = f"{self._root}/{checkpoint.path.name}"
        manifest = f"{target}/{MANIFEST}"
        if self._files.exists(manifest) and self._files.size(manifest) == (checkpoint.path / MANIFEST).stat().st_size:
            return
        self._files.makedirs(target, exist_ok=True)
        for name in (*checkpoint.manifest["files"], MANIFEST):
            self._files.put_file(str(checkpoint.path / name), f"{target}/{name}")

        for old in _complete(self._files, self._root)[self._keep :] if self._keep is not None else ():
            self._remove(old)

    def fetch_newest(self, run: Path, beyond: int = -1) -> str | None:
        """Bring the newest complete copy of more than `beyond` steps into the run's folder; its name, or None.

        A copy that cannot be read is passed over, with an event.
        """
        names = [name for name in _complete(self._files, self._root) if Checkpoint(Path(name)).step > beyond]
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
        for name in _complete(self._files, self._root):
            if Checkpoint(Path(name)).step > step:
                self._remove(name)

    def _remove(self, name: str) -> None:
        """The manifest first: half a copy is no copy."""
        try:
            self._files.rm_file(f"{self._root}/{name}/{MANIFEST}")
            self._files.rm(f"{self._root}/{name}", recursive=True)
        except OSError as error:
            self._report(EventKind.COPY_FAILED, message=f"{self._url}: {name} cannot be removed: {error}")

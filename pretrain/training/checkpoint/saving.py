"""One save under way on one rank, in a thread: no step is needed for it to end.

    every rank      writes its shard (where there is a fast folder, there first, and copies it)
                    ->  says so over the process group's store
    the leader      hears that all have written  ->  commits

A step that hangs, or a rank that ends, so costs no checkpoint whose shards are all on the disk.
"""

import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from torch import Tensor

from data_pipeline.durable import atomic_path, file_sha256, sync_folder, write_durably
from pretrain import __version__
from pretrain.training.checkpoint import disk
from pretrain.training.checkpoint.rank_file import write_rank_file
from pretrain.training.distributed import DistributedContext

FIRST_PAUSE, LONGEST_PAUSE = 0.02, 0.5  # seconds between two looks at the store
TEXTS = (disk.INDEX, disk.STATE, disk.CONFIG)  # the leader's, beside the shards
Files = dict[str, dict[str, Any]]  # name -> bytes, sha256
Commit = Callable[[Files], None]
_numbers = count()  # of the saves of this process; all ranks make the same ones, so a number names a save on all


def shard_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def note_name(rank: int) -> str:
    """Size and digest of a shard in a fast folder."""
    return f"rank-{rank:05d}.json"


def copy_durably(source: Path, target: Path) -> None:
    """Raises OSError where a disk does."""
    with atomic_path(target) as temporary:
        shutil.copyfile(source, temporary)


def commit(checkpoints: Path, step: int, files: Files, texts: Mapping[str, str]) -> Path:
    """Complete the checkpoint whose shards, `files`, are written: the other files, the manifest, the name, `latest`.
    Returns its folder. texts: of TEXTS those that are not there yet. The leader's.
    """
    temporary, final = disk.writing_folder(checkpoints, step), checkpoints / disk.step_name(step)
    for name in TEXTS:
        if name in texts:
            write_durably(temporary / name, texts[name])
        files[name] = {"bytes": (temporary / name).stat().st_size, "sha256": file_sha256(temporary / name)}
    manifest = {"schema": disk.SCHEMA, "version": __version__, "step": step, "files": files}
    write_durably(temporary / disk.MANIFEST, disk.sealed(manifest))
    if final.exists():
        set_aside(final)
    os.rename(temporary, final)
    sync_folder(checkpoints)
    write_durably(checkpoints / disk.LATEST, final.name)
    return final


def set_aside(path: Path) -> None:
    """Give a checkpoint that is not to be read a name that says so."""
    number = 0
    while (target := path.with_name(f"damaged-{path.name}-{number}")).exists():
        number += 1
    os.rename(path, target)


class Save:
    """folder: where the shard goes. commit: the leader's, called with size and digest of every shard once all are
    there. fast: this node's fast folder for the step; texts: what the leader leaves there beside its shard. `error` is
    what went wrong on this rank; `not_fast` why the fast folder was done without.
    """

    def __init__(
        self,
        folder: Path,
        entries: Sequence[tuple[str, Tensor]],
        context: DistributedContext,
        commit: Commit,
        *,
        fast: Path | None = None,
        texts: Mapping[str, str] | None = None,
    ) -> None:
        self._folder, self._entries, self._context, self._commit = folder, list(entries), context, commit
        self._fast, self._texts = fast, texts or {}
        self.not_fast: OSError | None = None
        self._name = f"checkpoint/{next(_numbers)}"
        self.error: Exception | None = None
        self._written, self._abandoned = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="checkpoint")
        self._thread.start()

    @property
    def done(self) -> bool:
        """Has this rank done its part? The leader's includes the commit."""
        return not self._thread.is_alive()

    def wait_for_shard(self) -> None:
        """Until this rank's shard is on the disk, or could not be written."""
        self._written.wait()

    def wait(self) -> None:
        """Until this rank's part is done; to be called when every rank's shard is known to be written or not."""
        self._thread.join()

    def abandon(self) -> None:
        """The run ends by an error: commit if all shards are there, wait for none."""
        self._abandoned.set()
        self._thread.join()

    def _key(self, rank: int) -> str:
        return f"{self._name}/{rank}"

    def _work(self) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            shard = shard_name(self._context.rank)
            there = self._write_fast(self._fast) if self._fast is not None else None
            if self._fast is not None and there is not None:
                mine = there
                copy_durably(self._fast / shard, self._folder / shard)
            else:
                mine = write_rank_file(self._folder / shard, self._entries)
        except Exception as error:  # whatever it is, every rank must hear of it
            self.error, mine = error, {}
        try:
            if not self._context.leader:
                self._context.say(self._key(self._context.rank), json.dumps(mine))
            self._written.set()
            if self._context.leader and (files := self._shards(mine)) is not None:
                self._commit(files)
        except Exception as error:
            self.error = self.error or error
        finally:
            self._written.set()

    def _write_fast(self, fast: Path) -> dict[str, Any] | None:
        """Size and digest of the shard in the fast folder; None where that does not take it: then it goes without."""
        rank = self._context.rank
        try:
            fast.mkdir(parents=True, exist_ok=True)
            for name, text in self._texts.items():
                write_durably(fast / name, text)
            written = write_rank_file(fast / shard_name(rank), self._entries)
            write_durably(fast / note_name(rank), json.dumps({**written, "ranks": self._context.world_size}))
        except OSError as error:
            self.not_fast = error
            (fast / shard_name(rank)).unlink(missing_ok=True)
            return None
        return written

    def _shards(self, mine: dict[str, Any]) -> dict[str, dict[str, Any]] | None:
        """Size and digest of every rank's shard; None where one could not be written, or is not waited for any more."""
        keys = [self._key(rank) for rank in range(1, self._context.world_size)]
        pause = FIRST_PAUSE
        while True:
            last_look = self._abandoned.is_set()
            if (said := self._context.heard(keys)) is not None:
                every = [mine, *(json.loads(text) for text in said)]
                return {shard_name(rank): one for rank, one in enumerate(every)} if all(every) else None
            if last_look:
                return None
            self._abandoned.wait(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

"""One save under way on one rank, in a thread: no step is needed for it to end.

    every rank      writes its shard  ->  says so over the process group's store
    the leader      hears that all have written  ->  commits

A step that hangs, or a rank that ends, so costs no checkpoint whose shards are all on the disk.
"""

import json
import threading
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from torch import Tensor

from pretrain.training.checkpoint.rank_file import write_rank_file
from pretrain.training.distributed import DistributedContext

FIRST_PAUSE, LONGEST_PAUSE = 0.02, 0.5  # seconds between two looks at the store
Commit = Callable[[dict[str, dict[str, Any]]], None]
_numbers = count()  # of the saves of this process; all ranks make the same ones, so a number names a save on all


def shard_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


class Save:
    """folder: where the shard goes. commit: the leader's, called with size and digest of every shard once all are
    there. `error` is what went wrong on this rank.
    """

    def __init__(
        self, folder: Path, entries: Sequence[tuple[str, Tensor]], context: DistributedContext, commit: Commit
    ) -> None:
        self._folder, self._entries, self._context, self._commit = folder, list(entries), context, commit
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
            mine = write_rank_file(self._folder / shard_name(self._context.rank), self._entries)
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

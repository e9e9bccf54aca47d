"""Writing and restoring checkpoints from a running engine, all ranks together.

save(step)   copy this rank's fragments aside (memory to memory: all that a step waits for), start a thread that writes
             them (saving.py); once all ranks have written, rank 0's completes the checkpoint (index, state, manifest;
             fsync; rename; `latest`; rotation), whether or not another step ends
progress()   how far this rank's part is, for the agreement of each step
advance()    what all ranks have agreed on becomes of the save: complete, or dropped where a rank failed
wait()       at the end: until nothing is pending
restore()    load the newest intact checkpoint that the leader sees; set damaged ones aside, with an event
"""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.durable import remove_leftovers, write_durably
from data_pipeline.errors import GaveUpError, UserError
from data_pipeline.reading.order.course import Segment
from pretrain.configuration.schema import CheckpointConfig
from pretrain.training.checkpoint import disk
from pretrain.training.checkpoint.disk import Checkpoint, DamagedError, OpenFiles
from pretrain.training.checkpoint.fast_folder import fast_folder
from pretrain.training.checkpoint.identity import run_identity
from pretrain.training.checkpoint.retention import Kept, to_delete
from pretrain.training.checkpoint.saving import Files, Save, commit, set_aside, shard_name
from pretrain.training.checkpoint.second_tier import SecondTier
from pretrain.training.checkpoint.trained_on import TrainedOn
from pretrain.training.distributed import DistributedContext
from pretrain.training.logging.kinds import EventKind
from pretrain.training.logging.record import EventLog
from pretrain.training.segments import as_json
from pretrain.training.zero.ema import Ema
from pretrain.training.zero.engine import Engine

FAILURES_ALLOWED = 3
COPY_TICK = 2.0  # seconds
STALE_SECONDS = 90.0  # attributes and names are cached by NFS for 60 s by default


class Checkpointer:
    """run: its folder. config_text, data: what every checkpoint's config.yaml says, and its state.json about the data.
    report: writes an event.
    """

    def __init__(
        self,
        run: Path,
        settings: CheckpointConfig,
        engine: Engine,
        ema: Ema | None,
        context: DistributedContext,
        report: EventLog,
        *,
        config_text: str,
        trained_on: TrainedOn,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.run, self._settings, self.engine, self.ema = run, settings, engine, ema
        self._config_text, self._trained_on = config_text, trained_on
        self._folder = run / disk.FOLDER
        self._context, self._report, self._clock = context, report, clock
        self._entries = self._layout()
        # Staging would bring back into memory what the user has put into files.
        self._asynchronous = settings.asynchronous and engine.offload_folder is None
        if settings.asynchronous and not self._asynchronous and context.leader:
            report(
                EventKind.SYNCHRONOUS_CHECKPOINTS,
                message="training.offload_folder: a step waits until a save is written",
            )
        self._staging: list[Tensor] | None = None
        self._index = json.dumps(self._build_index())
        self._save: Save | None = None
        self._error: Exception | None = None  # of this rank's last save
        self._failures = 0
        self._saved_at = clock()
        self.last_step = -1
        self._fetched: set[str] = set()  # names of copies that were asked for in place of damaged checkpoints
        copies = settings.copy_to if context.leader else None
        self._second = None
        if copies is not None:
            self._second = SecondTier(copies, report, run_identity(run), settings.keep_copies)
        self._fast = fast_folder(settings.fast_folder, run, context) if settings.fast_folder is not None else None
        if context.leader:
            self._folder.mkdir(parents=True, exist_ok=True)
            for prefix in (disk.WRITING, disk.DELETING):
                for left in self._folder.glob(f"{prefix}*"):
                    shutil.rmtree(left, ignore_errors=True)
            remove_leftovers(self._folder)
        context.barrier()

    # --- what is saved
    def _layout(self) -> list[tuple[str, Tensor]]:
        """(key, live tensor) of everything that this rank writes."""
        entries = [(f"{kind}/{f.name}", tensor) for f in self.engine.owned for kind, tensor in f.kinds()]
        if self.ema is not None:
            entries += [(f"ema/{f.name}", value) for f, value in zip(self.ema.fragments, self.ema.values, strict=True)]
        if self._context.leader:
            entries += [(f"buffer/{name}", buffer) for name, buffer in self.engine.buffers()]
        return entries

    def _build_index(self) -> dict[str, Any]:
        mine = [(f.name, f.shape, f.start, f.length, f.trainable) for f in self.engine.owned]
        parameters: dict[str, Any] = {}
        for rank, fragments in enumerate(self._context.gather(mine)):
            for name, shape, start, length, trainable in fragments:
                entry = parameters.setdefault(
                    name, {"shape": list(shape), "ema": trainable and self.ema is not None, "fragments": []}
                )
                entry["fragments"].append([shard_name(rank), start, length])
        return {"parameters": parameters, "buffers": {name: shard_name(0) for name, _ in self.engine.buffers()}}

    # --- saving
    def due(self, step: int) -> bool:
        """Does this rank want a checkpoint after `step` steps? By steps, or by minutes of the leader's clock."""
        settings = self._settings
        if settings.every_steps and step % settings.every_steps == 0:
            return True
        if settings.every_minutes is None:
            return False
        return self._context.leader and self._clock() - self._saved_at >= 60 * settings.every_minutes

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Start saving. `state` becomes state.json, with the engine's counters added."""
        if step == self.last_step:
            return
        self.wait()
        self._saved_at, self.last_step = self._clock(), step
        counters = {
            "step": step,
            "adam_steps": self.engine.adam_steps,
            "scaler": self.engine.scaler_state(),
            "world_size": self._context.world_size,
            "zero_stage": self.engine.stage,
        }
        state = {"data": self._trained_on.as_json()} | state | counters
        entries = self._stage() if self._asynchronous else self._entries
        texts = {disk.INDEX: self._index, disk.STATE: json.dumps(state), disk.CONFIG: self._config_text}
        self._save = Save(
            self._temporary(step),
            entries,
            self._context,
            partial(self._commit, step, texts),
            fast=None if self._fast is None else self._fast / disk.step_name(step),
            texts=texts if self._context.leader else {},
        )
        if not self._asynchronous:
            self.wait()

    @torch.no_grad()
    def _stage(self) -> list[tuple[str, Tensor]]:
        live = [tensor for _, tensor in self._entries]
        if self._staging is None:
            self._staging = [torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu") for tensor in live]
        for copy, tensor in zip(self._staging, live, strict=True):
            copy.copy_(tensor)
        return [(key, copy) for (key, _), copy in zip(self._entries, self._staging, strict=True)]

    def _temporary(self, step: int) -> Path:
        return disk.writing_folder(self._folder, step)

    def progress(self) -> tuple[bool, bool]:
        """(this rank is done with its part of the save under way, the part failed); (False, False) without one."""
        if self._save is None or not self._save.done:
            return False, False
        return True, self._save.error is not None

    def advance(self, *, written: bool, failed: bool) -> None:
        """End a save. written, failed: of all ranks' `progress`, as they have agreed."""
        if self._save is not None and written:
            self._end_save(failed)

    def wait(self) -> bool:
        """Until nothing is pending. Collective. Was the last save good?"""
        if self._save is not None:
            self._save.wait_for_shard()
            self._context.barrier()  # now every rank has said how it went: the leader waits for none that is gone
            self._save.wait()
            self._end_save(self._context.sum([float(self._save.error is not None)])[0] > 0)
        return self._failures == 0

    def abandon(self) -> None:
        """The run ends by an error. Not collective: a checkpoint whose shards are all there is completed, no more."""
        if self._save is not None:
            self._save.abandon()

    def wait_or_raise(self) -> bool:
        """At the end of the work: raises GaveUpError where the last save failed, for then work would be lost unsaid.

        A copy elsewhere is not waited for: the time after a request to stop is short, and the next start makes it.
        """
        if not self.wait():
            raise GaveUpError(
                f"the last checkpoint could not be written to {self._folder} "
                f"({self._error or 'another rank says why'}); make room or mend the disk, "
                "and run the same command again: it goes on from the checkpoint before"
            )
        return True

    def close(self, alive: Callable[[], None]) -> None:
        """The run is done: its last checkpoint's copy is made, however long that takes. Collective.

        alive: called again and again meanwhile.
        """
        while not self._context.from_leader(lambda: self._second is None or self._second.finish(COPY_TICK)):
            alive()

    def _end_save(self, failed: bool) -> None:
        assert self._save is not None
        self._error, not_fast, self._save = self._save.error, self._save.not_fast, None
        if not_fast is not None:
            self._report(EventKind.FAST_FOLDER_FAILED, step=self.last_step, message=f"{self._fast}: {not_fast}")
        if not failed:
            self._failures = 0
            self._forget_fast()
            return
        step, self.last_step = self.last_step, -1
        self._failures += 1
        if self._error is not None:
            self._report(EventKind.CHECKPOINT_FAILED, step=step, message=f"{self._temporary(step)}: {self._error}")
        if self._context.leader:
            shutil.rmtree(self._temporary(step), ignore_errors=True)
        if self._failures >= FAILURES_ALLOWED:
            raise GaveUpError(
                f"{self._failures} checkpoints in a row could not be written to {self._folder} "
                f"({self._error or 'another rank says why'}); make room or mend the disk, "
                "and run the same command again"
            )

    def _commit(self, step: int, texts: dict[str, str], files: Files) -> None:
        """The leader's, in the thread of the save. files: size and digest of every shard."""
        final = commit(self._folder, step, files, texts)
        self._report(EventKind.CHECKPOINT, step=step, bytes=sum(entry["bytes"] for entry in files.values()))
        if self._second is not None:
            self._second.offer(Checkpoint(final))
        self._rotate(step)

    def _forget_fast(self) -> None:
        """What the run's folder holds, or what it has gone back from, is not wanted there any more."""
        if self._fast is not None:
            for place in self._fast.glob("step-*"):
                shutil.rmtree(place, ignore_errors=True)

    def _rotate(self, newest: int) -> None:
        best = self._folder / disk.BEST
        chosen = Checkpoint(self._folder / best.read_text().strip()).step if best.is_file() else None
        there = {old.step: old for old in disk.complete_checkpoints(self.run) if old.step <= newest}
        # What this run itself has written has one size; a manifest is read where the size counts.
        sized = self._settings.keep_gigabytes is not None
        kept = [Kept(step, old.bytes if sized else 0) for step, old in there.items()]
        for step in to_delete(kept, self._settings, chosen):
            self._delete(there[step])

    # --- restoring
    def restore(self, before: int | None = None) -> dict[str, Any] | None:
        """Load the newest intact checkpoint; its state.json, or None where there is none at all. Collective.

        The leader says which there are, for two ranks may see different states of a shared file system. before: prefer
        one of at most so many steps (a rollback), and drop the newer ones. Raises UserError where there are checkpoints
        but none is intact: starting afresh over them would lose the run; and where the run was trained on other data.
        """
        refused = []
        candidates = self._context.from_leader(lambda: self._candidates(before))
        while candidates:
            name, complete = candidates.pop(0)
            checkpoint = Checkpoint(self._folder / name)
            if complete:
                self._await(checkpoint)
            problem = self._verify(checkpoint)
            if problem is None:
                state: dict[str, Any] = self._context.from_leader(partial(_state_of, checkpoint))
                self._check_data(TrainedOn.from_json(state["data"]))
                self._load(checkpoint)
                self.last_step = checkpoint.step
                if before is not None:
                    self._forget_fast()
                    if self._context.leader:
                        self._drop_beyond(checkpoint)
                self._context.barrier()
                return state
            refused.append(problem)
            if self._context.leader:
                self._report(EventKind.CHECKPOINT_REFUSED, step=checkpoint.step, message=problem)
                with contextlib.suppress(OSError):  # a read-only folder: it is refused again next time
                    set_aside(checkpoint.path)
            if self._context.from_leader(partial(self._fetched_again, name)):
                candidates.insert(0, (name, True))
        if refused:
            raise UserError(
                f"none of the checkpoints under {self._folder} is intact:\n  " + "\n  ".join(refused) + "\n"
                "They were set aside as damaged-*. Restore the folder from a copy, or name a new --output"
            )
        if self._context.from_leader(lambda: any(self._folder.glob("damaged-*"))):
            # Refused at an earlier start, and still not to be started over.
            raise UserError(
                f"the checkpoints under {self._folder} were damaged and set aside as damaged-*, and none is left. "
                "Restore the folder from a copy, or name a new --output"
            )
        return None

    def _candidates(self, before: int | None) -> list[tuple[str, bool]]:
        """(name, has a manifest), the best first: newest first; for a rollback those from before it, then the oldest of
        the others.
        """
        there = disk.resumable_checkpoints(self.run)
        if self._second is not None and before is None:
            newest = max((checkpoint.step for checkpoint in disk.complete_checkpoints(self.run)), default=-1)
            if self._second.fetch_newest(self.run, beyond=newest):
                there = disk.resumable_checkpoints(self.run)
            if complete := disk.complete_checkpoints(self.run):
                self._second.offer(complete[0])  # where the run ended before its copy was made
        if before is not None:
            early = [checkpoint for checkpoint in there if checkpoint.step <= before]
            there = early + [checkpoint for checkpoint in reversed(there) if checkpoint.step > before]
        return [(checkpoint.path.name, (checkpoint.path / disk.MANIFEST).is_file()) for checkpoint in there]

    def _fetched_again(self, name: str) -> bool:
        """Of a checkpoint that was set aside as damaged: has its copy elsewhere taken its place? The leader's."""
        fetched = self._second is not None and name not in self._fetched and self._second.fetch(self.run, name)
        self._fetched.add(name)
        return fetched

    def _await(self, checkpoint: Checkpoint) -> None:
        """Until this rank sees what the leader sees: a client of a network file system may be a minute behind."""
        deadline = self._clock() + STALE_SECONDS
        while not (checkpoint.path / disk.MANIFEST).exists() and self._clock() < deadline and not self._context.leader:
            with contextlib.suppress(OSError):
                os.listdir(self._folder)  # has the client ask again
            time.sleep(0.1)

    def _drop_beyond(self, checkpoint: Checkpoint) -> None:
        """The run went back to `checkpoint`: those of the line that it left must not be resumed. Leader's."""
        write_durably(self._folder / disk.LATEST, checkpoint.path.name)
        for newer in disk.complete_checkpoints(self.run):
            if newer.step > checkpoint.step:
                self._delete(newer)
        if self._second is not None:
            self._second.drop_beyond(checkpoint.step)

    def _delete(self, old: Checkpoint) -> None:
        """Without its name first: a crash inside the deletion must not leave half a checkpoint."""
        going = old.path.with_name(f"{disk.DELETING}{old.path.name}")
        os.rename(old.path, going)
        shutil.rmtree(going, ignore_errors=True)

    def _check_data(self, before: TrainedOn) -> None:
        if difference := before.difference(self._trained_on):
            raise UserError(f"{self.run} {difference}. Name the same sets, or start a new run")

    def _verify(self, checkpoint: Checkpoint) -> str | None:
        problem = None
        try:
            checkpoint.verify(part=self._context.rank, parts=self._context.world_size)
        except DamagedError as error:
            problem = str(error)
        problems = [found for found in self._context.gather(problem) if found]
        return problems[0] if problems else None

    @torch.no_grad()
    def _load(self, checkpoint: Checkpoint) -> None:
        files, known = OpenFiles(), checkpoint.index["parameters"]
        expected = {name for name, _ in self.engine.module.named_parameters()}
        if expected != set(known):
            odd = sorted(expected ^ set(known))
            raise UserError(
                f"checkpoint {checkpoint.path} is of another model: for instance {odd[0]!r} is only on one side"
            )
        for fragment in self.engine.held:
            if list(fragment.shape) != known[fragment.name]["shape"]:
                raise UserError(
                    f"checkpoint {checkpoint.path}: {fragment.name} has shape {known[fragment.name]['shape']}, "
                    f"this model {list(fragment.shape)}"
                )
            for kind, tensor in fragment.kinds():
                checkpoint.read_into(tensor, kind, fragment.name, fragment.start, files)
        for name, buffer in self.engine.buffers():
            buffer.copy_(files.get(checkpoint.path / shard_name(0)).get_tensor(f"buffer/{name}"))
        self.engine.publish()
        if self.ema is not None:
            for fragment, value in zip(self.ema.fragments, self.ema.values, strict=True):
                kind = "ema" if known[fragment.name]["ema"] else "param"
                checkpoint.read_into(value, kind, fragment.name, fragment.start, files)
        self.engine.adam_steps = checkpoint.state["adam_steps"]
        self.engine.load_scaler_state(checkpoint.state["scaler"])


def _state_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Where it names no segments, an earlier build wrote it, which had one a run."""
    if "segments" in checkpoint.state:
        return checkpoint.state
    weights = tuple(source.weight for source in checkpoint.config.data.sources)
    return checkpoint.state | {"segments": as_json([Segment(0, checkpoint.config.training.batch_size, weights)])}

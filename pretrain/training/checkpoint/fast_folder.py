"""A fast folder on every node, before the run's own: a save is on the nodes' disks long before it is on the shared one.

    FAST/ID/step-00001000/  rank-00003.safetensors      a rank's shard, and
                            rank-00003.json             its size and digest, written last
                            index.json state.json config.yaml   on the leader's node
       --in the background-->  RUN/checkpoints/step-00001000, and gone from FAST

ID, of the run, stands in RUN/checkpoints/run-id. What a start finds in FAST is a save that came no further. Where the
ranks have every part of it between them and the run has nothing newer, they bring it over before anything is restored.
"""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.durable import file_sha256
from pretrain.training.checkpoint import disk
from pretrain.training.checkpoint.identity import run_identity
from pretrain.training.checkpoint.saving import TEXTS, commit, copy_durably, shard_name
from pretrain.training.distributed import DistributedContext
from pretrain.training.logging.kinds import EventKind
from pretrain.training.logging.record import EventLog

Inventory = dict[int, dict[str, dict[str, Any]]]  # step -> file -> bytes, sha256, ranks; of texts nothing


@dataclass(frozen=True)
class Found:
    """A whole save. sources: file -> the rank that has it. shards: file -> bytes, sha256."""

    step: int
    sources: dict[str, int]
    shards: dict[str, dict[str, Any]]


def fast_folder(root: str, run: Path, context: DistributedContext) -> Path:
    """This node's folder of this run. root: as the configuration has it; variables as $TMPDIR are the node's own."""
    identity = context.from_leader(lambda: run_identity(run))
    return Path(os.path.expandvars(root)) / identity


def bring_over(folder: Path, run: Path, context: DistributedContext, report: EventLog) -> None:
    """Complete in `run` what is whole on the nodes and newer; then nothing is left there. folder: this node's.
    Collective.
    """
    inventories = context.gather(inventory(folder))
    found = context.from_leader(lambda: newest_whole(inventories, _newest_step(run)))
    if found is not None:
        problems = [problem for problem in context.gather(_copy(found, folder, run, context.rank)) if problem]
        if context.leader:
            if problems:
                report(EventKind.COPY_FAILED, step=found.step, message=f"{folder}: {problems[0]}")
                shutil.rmtree(_temporary(run, found.step), ignore_errors=True)
            else:
                commit(run / disk.FOLDER, found.step, dict(found.shards), {})
                report(EventKind.CHECKPOINT, step=found.step, source="fast folder")
        if problems:
            return  # another start may be luckier
    context.barrier()
    shutil.rmtree(folder, ignore_errors=True)


def inventory(folder: Path) -> Inventory:
    """Of what was written to its end; a file without its note was not."""
    found: Inventory = {}
    for place in folder.glob("step-*"):
        files: dict[str, dict[str, Any]] = {name: {} for name in TEXTS if (place / name).is_file()}
        for note in place.glob("rank-*.json"):
            shard = note.with_suffix(".safetensors")
            entry = json.loads(note.read_text(encoding="utf-8"))
            if shard.is_file() and shard.stat().st_size == entry["bytes"]:
                files[shard.name] = entry
        found[disk.Checkpoint(place).step] = files
    return found


def newest_whole(inventories: Sequence[Inventory], newest: int) -> Found | None:
    """The newest save beyond step `newest` of which every file is somewhere. inventories: by rank. Pure."""
    for step in sorted({step for one in inventories for step in one}, reverse=True):
        sources: dict[str, int] = {}
        files: dict[str, dict[str, Any]] = {}
        for rank, one in enumerate(inventories):
            for name, entry in one.get(step, {}).items():
                if name not in sources:
                    sources[name], files[name] = rank, entry
        shards = {name: entry for name, entry in files.items() if entry}
        ranks = {entry["ranks"] for entry in shards.values()}
        if step <= newest or len(ranks) != 1:
            continue
        if sources.keys() == {*TEXTS, *(shard_name(rank) for rank in range(ranks.pop()))}:
            plain = {name: {"bytes": entry["bytes"], "sha256": entry["sha256"]} for name, entry in shards.items()}
            return Found(step, sources, plain)
    return None


def _copy(found: Found, folder: Path, run: Path, rank: int) -> str | None:
    """Bring over what is this rank's to bring; why that failed, or None."""
    source, target = folder / disk.step_name(found.step), _temporary(run, found.step)
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name, owner in found.sources.items():
            if owner == rank:
                copy_durably(source / name, target / name)
                if name in found.shards and file_sha256(target / name) != found.shards[name]["sha256"]:
                    return f"{name} does not have the digest that was noted"
    except OSError as error:
        return str(error)
    return None


def _temporary(run: Path, step: int) -> Path:
    return disk.writing_folder(run / disk.FOLDER, step)


def _newest_step(run: Path) -> int:
    return max((checkpoint.step for checkpoint in disk.complete_checkpoints(run)), default=-1)

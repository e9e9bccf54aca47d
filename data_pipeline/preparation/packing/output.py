"""The output folder of a preparation run: one run at a time, resumed only with the plan it began with.

`plan.json` says what the shards are made from (digest of the input, number of rows) and how (options). A killed run
leaves it behind; the next run with the same plan finishes the set, a run with another plan is refused.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from data_pipeline.durable import file_lock, write_durably
from data_pipeline.errors import UserError
from data_pipeline.executors.units import Part
from data_pipeline.format.manifest import SET_MANIFEST
from data_pipeline.preparation.packing.samples import recover

PLAN = "plan.json"
PARTS_FOLDER = ".parts"


@contextmanager
def hold_output(folder: Path, plan: Mapping[str, Any]) -> Iterator[None]:
    """Locks `folder` for one run of `plan`.

    What a killed run left unfinished is put right first. Raises UserError where another run is writing there, or where
    the folder holds shards of another plan.
    """
    with ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            mine = held.enter_context(file_lock(folder / ".lock", wait=False))
        except OSError as error:
            raise UserError(f"output folder {folder} cannot be written: {error.strerror}; choose another") from None
        if not mine:
            raise UserError(f"another run is writing to {folder}; wait for it, or choose another output")
        agree_on_plan(folder, plan)
        recover(folder)
        yield


def part_folder(output: Path, part: Part | None) -> Path:
    """Returns where a part of a run writes; the output itself for the whole."""
    return output if part is None else output / PARTS_FOLDER / f"{part.index + 1:05d}-of-{part.count:05d}"


def check_part(output: Path, part: Part) -> None:
    """Raises UserError where a run in another number of parts has begun: its parts are other ranges of shards."""
    if (output / SET_MANIFEST).exists():
        return
    folder = output / PARTS_FOLDER
    counts = {int(path.name.rpartition("-of-")[2]) for path in folder.glob("*-of-*")} - {part.count}
    if counts:
        begun = min(counts)
        raise UserError(
            f"{output} was begun in {begun} parts, not in {part.count}; go on with --parts {begun}, or delete {folder} "
            "and begin anew"
        )


def part_plan(plan: Mapping[str, Any], part: Part | None) -> dict[str, Any]:
    return dict(plan) if part is None else {**plan, "part": f"{part.index + 1}/{part.count}"}


def folder_digest(folder: Path, paths: Iterable[Path]) -> str:
    """Hashes names, sizes and times of files, to notice a change without reading the files."""
    digest = hashlib.sha256()
    for path in paths:
        status = path.stat()
        digest.update(f"{path.relative_to(folder)}\0{status.st_size}\0{status.st_mtime_ns}\0".encode(errors="replace"))
    return digest.hexdigest()


def agree_on_plan(folder: Path, plan: Mapping[str, Any]) -> None:
    """Writes `plan.json` where there is none; raises UserError where it says something else. Call under a lock."""
    path = folder / PLAN
    wanted = json.loads(json.dumps(plan))
    if not path.exists():
        if (folder / SET_MANIFEST).exists() or any(folder.glob("*.tar")):
            raise UserError(f"{folder} already holds shards that this did not write; choose another output folder")
        write_durably(path, (json.dumps(wanted, indent=1, ensure_ascii=False) + "\n").encode())
        return
    try:
        begun = json.loads(path.read_bytes())
    except ValueError:
        raise UserError(f"{path} is damaged; choose another output folder, or delete {folder} and begin anew") from None
    changed = sorted(key for key in wanted.keys() | begun.keys() if wanted.get(key) != begun.get(key))
    if changed:
        raise UserError(
            f"{folder} was begun with other input or options ({', '.join(changed)} changed); "
            "run with the former ones to finish it, or choose another output folder"
        )

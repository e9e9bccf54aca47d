"""Which run is this? An id in RUN/checkpoints/run-id ties to the run what lies elsewhere: saves in a node's fast
folder, copies in an object store.
"""

import uuid
from pathlib import Path

from data_pipeline.durable import write_durably
from pretrain.training.checkpoint.disk import FOLDER

IDENTITY, FORMER_IDENTITY = "run-id", "fast-id"


def known_identity(run: Path) -> str | None:
    """The run's id; None for a run that is new, or whose folder is gone."""
    for name in (IDENTITY, FORMER_IDENTITY):
        path = run / FOLDER / name
        if path.is_file():
            return path.read_text(encoding="utf-8").strip()
    return None


def run_identity(run: Path) -> str:
    """The run's id, made where there is none."""
    return known_identity(run) or give_identity(run, uuid.uuid4().hex)


def give_identity(run: Path, identity: str) -> str:
    path = run / FOLDER / IDENTITY
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, identity)
    return identity

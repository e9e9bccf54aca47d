"""Mistakes that can be seen before a process is started or torch imported: wrong keys, folders, batch sizes.

What is found here costs the user a second; the same mistake found by the ranks costs a queue's wait.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.errors import UserError
from data_pipeline.reading.order.share import rows_per_rank
from pretrain.configuration import RunConfig


def check_run(config: RunConfig, world_size: int, coming: Sequence[str] = ()) -> None:
    """Raises UserError naming the first thing that cannot work with `world_size` ranks. coming: runs that will be there
    when this one starts.
    """
    check_batch(config, world_size)
    for source in config.data.sources:
        check_source(source.path)
    if config.evaluation.data is not None and not Path(config.evaluation.data).is_dir():
        raise UserError(f"evaluation.data: {config.evaluation.data!r} is not a folder (looked from {os.getcwd()})")
    weights = config.initialize_from
    if weights is not None and weights not in coming and not Path(weights).exists():
        raise UserError(
            f"initialize_from: {config.initialize_from!r} does not exist; "
            "give a run directory, a checkpoint or a weights file"
        )


def check_batch(config: RunConfig, world_size: int) -> None:
    rows_per_rank(config.training.batch_size, config.training.accumulation, world_size)


def check_source(path: str) -> None:
    """A local set must be a folder with a manifest or tar files. Remote ones are looked at when they are read."""
    if "://" in path or path.startswith("pipe:"):
        return
    folder = Path(path)
    if not folder.exists():
        raise UserError(
            f"data.sources: the shard folder {path!r} does not exist (looked from {os.getcwd()}); "
            "make it with `internimage shards pack`, or correct data.sources.N.path"
        )
    if folder.is_dir() and not (folder / "manifest.json").is_file() and next(folder.glob("*.tar"), None) is None:
        raise UserError(
            f"data.sources: {path!r} holds neither manifest.json nor a .tar file; is it the folder of the shards?"
        )


def check_output(output: Path) -> None:
    """The run directory must be a folder that can be made or written to."""
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output}: exists and is not a folder")
    try:
        output.mkdir(parents=True, exist_ok=True)
        probe = output / f".write-test-{os.getpid()}"  # os.access lies to root on a read-only mount
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written to ({error.strerror}); choose another folder") from None

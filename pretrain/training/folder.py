"""The run's folder: made, locked against a second run, checked before anything is written into it, and given the
configuration once that has made a run.
"""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from data_pipeline.durable import file_lock, write_durably
from data_pipeline.errors import UserError
from pretrain.configuration import RunConfig, dump_config
from pretrain.training.checkpoint.second_tier import claim
from pretrain.training.distributed import DistributedContext
from pretrain.training.logging.record import CONFIG, ENVIRONMENT, environment, turn_over_events
from pretrain.training.resume import Changes, check_same_run, remember_changes

AFTER_THE_GRACE = 30.0  # seconds until a launcher's guardian has killed what did not end by itself


class Waiting:
    """Says once that the folder is still in use."""

    def __init__(self, output: Path) -> None:
        self._message: str | None = f"{output}: another process is training or ending here; waiting for it"

    def __call__(self) -> None:
        if self._message is not None:
            print(self._message, file=sys.stderr, flush=True)
            self._message = None


@contextmanager
def open_run(output: Path, config: RunConfig, context: DistributedContext) -> Iterator[Changes]:
    """The folder is this run's until the block ends; gives the wanted changes of its configuration (on the leader).
    Collective.

    Raises UserError, on every rank, where another process trains there, where the folder holds a run that `config` may
    not go on with, or where it cannot be written.
    """
    changes: Changes = {}
    with ExitStack() as stack:
        problem = None
        if context.leader:
            try:
                output.mkdir(parents=True, exist_ok=True)
                # Ranks of the start before may still be saving, or about to be killed by their launcher's guardian.
                patience = config.training.policy.grace_seconds + AFTER_THE_GRACE
                if not stack.enter_context(file_lock(output / ".lock", patience=patience, heartbeat=Waiting(output))):
                    raise UserError(
                        f"{output}: another process is training here, and has not ended within {patience:g} s; "
                        "stop it, or name another --output"
                    )
                changes = check_same_run(output, config)
                if config.checkpoint.copy_to is not None:
                    claim(config.checkpoint.copy_to, output, config)
                turn_over_events(output)
            except UserError as error:
                problem = str(error)
            except OSError as error:
                problem = f"{output}: cannot write the run folder ({error.strerror or error}); name a writable --output"
        if problems := [found for found in context.gather(problem) if found]:
            raise UserError(problems[0])
        yield changes


def record_start(output: Path, config: RunConfig, context: DistributedContext, changes: Changes, step: int) -> None:
    """Write down what a run that has been put together goes on with, from `step`. The leader's.

    Not before: what a start was refused for must not bind the next one, nor a change be there that was never made.
    """
    remember_changes(output, changes, step)
    write_durably(output / CONFIG, dump_config(config))
    about = environment(context.world_size, context.device.type) | {"time": time.time()}
    write_durably(output / ENVIRONMENT, json.dumps(about, indent=1))

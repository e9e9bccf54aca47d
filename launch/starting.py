"""From one command to its ranks: this process is the only one, one of a launcher's, or the one that starts them."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launch import invocation, local, machine, preflight
from launch.ranks import release_signals
from launch.supervision import Patience
from pretrain.configuration import RunConfig

if TYPE_CHECKING:
    from pretrain.training.safeguards.interruption import Interruption


def start_ranks(
    config: RunConfig, output: Path, processes: str, words: Sequence[str], rank: "Callable[[Interruption], int]"
) -> int:
    """Check what can be checked, then be one rank or start the ranks of this machine; the exit code.

    words: the command line of each started rank. rank: what one rank does. It imports torch, which takes seconds: a
    request to stop that comes meanwhile is kept in the Interruption, for the run to find.
    """
    inside = invocation.inside_a_launcher()
    count = int(os.environ.get("WORLD_SIZE", "1")) if inside else machine.resolve_processes(processes)
    preflight.check_run(config, count)
    if not inside:
        preflight.check_output(output)
        if count > 1:
            patience = Patience.with_grace(config.training.policy.grace_seconds)
            command = invocation.own_command(words)
            return local.spawn(command, count, logs=output / "logs", patience=patience, hold_signals=True)
    from pretrain.training.safeguards.interruption import Interruption

    with Interruption() as interruption:
        release_signals()
        return rank(interruption)

"""`internimage launch local`."""

import os
import shlex
import sys
from typing import Annotated

import typer

from data_pipeline.errors import DONE
from launch.commands.launch.options import Command, DryRun, Logs, RestartPause, check_command

EXAMPLE = "internimage launch local --processes 8 pretrain internimage_t_in1k"


def local(
    command: Command,
    processes: Annotated[str, typer.Option(help="Ranks: a number, or auto = every GPU, 1 on a CPU.")] = "auto",
    logs: Logs = None,
    first_rank: Annotated[int, typer.Option(min=0, help="Number of this machine's first rank.")] = 0,
    world_size: Annotated[int | None, typer.Option(min=1, help="Ranks of all machines.")] = None,
    master_addr: Annotated[str, typer.Option(help="Where rank 0 runs.")] = "127.0.0.1",
    master_port: Annotated[int | None, typer.Option(help="Rank 0's port. [default: a free one]")] = None,
    max_restarts: Annotated[
        int, typer.Option(min=0, help="Start again after a failure so often in a row without a new checkpoint.")
    ] = 0,
    restart_pause: RestartPause = 10.0,
    control: Annotated[
        bool, typer.Option("--control", help="Take the environment and signal names from standard input.")
    ] = False,
    dry_run: DryRun = False,
) -> int:
    """Start COMMAND as ranks on this machine (or as this machine's share of a larger run)."""
    from data_pipeline.errors import UserError
    from launch import invocation
    from launch.hostfile import receive_environment
    from launch.local import spawn
    from launch.machine import resolve_processes
    from launch.ranks import Placement
    from launch.restarting import Budget, keep_running
    from launch.supervision import Patience, say

    if control:
        os.environ.update(receive_environment(sys.stdin.fileno()))
    count = resolve_processes(processes)
    world = world_size or count
    if first_rank + count > world:
        raise UserError(f"--first-rank {first_rank} + {count} processes are more than --world-size {world}")
    if world > count and master_port is None:
        raise UserError("several machines need the same --master-port on each")
    if world > count and max_restarts:
        raise UserError("--max-restarts is of whole runs: give it to `launch hostfile`, not to one machine's share")
    config = check_command(command, world)
    argv = invocation.resolve_command(command)
    if dry_run:
        typer.echo(f"{count} x {shlex.join(argv)}")
        return DONE
    run = invocation.run_directory(command)

    def start(number: int) -> int:
        return spawn(
            argv,
            count,
            placement=Placement(first_rank, world, master_addr, master_port),
            logs=logs or (run / "logs" if run else None),
            control=sys.stdin.fileno() if control else None,
            patience=None if config is None else Patience.with_grace(config.training.policy.grace_seconds),
            hold_signals=invocation.configuration_of(command) is not None,
        )

    return keep_running(start, run, Budget(max_restarts, restart_pause, queue=False), say=say)

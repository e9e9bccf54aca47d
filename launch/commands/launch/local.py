"""`internimage launch local`."""

import shlex
import sys
from typing import Annotated

import typer

from data_pipeline.errors import DONE
from launch.commands.launch.options import Command, DryRun, Logs, check_command

EXAMPLE = "internimage launch local --processes 8 pretrain internimage_t_in1k"


def local(
    command: Command,
    processes: Annotated[str, typer.Option(help="Ranks: a number, or auto = every GPU, 1 on a CPU.")] = "auto",
    logs: Logs = None,
    first_rank: Annotated[int, typer.Option(min=0, help="Number of this machine's first rank.")] = 0,
    world_size: Annotated[int | None, typer.Option(min=1, help="Ranks of all machines.")] = None,
    master_addr: Annotated[str, typer.Option(help="Where rank 0 runs.")] = "127.0.0.1",
    master_port: Annotated[int | None, typer.Option(help="Rank 0's port. [default: a free one]")] = None,
    control: Annotated[bool, typer.Option("--control", help="Take signal names from standard input.")] = False,
    dry_run: DryRun = False,
) -> int:
    """Start COMMAND as ranks on this machine (or as this machine's share of a larger run)."""
    from data_pipeline.errors import UserError
    from launch import invocation
    from launch.local import spawn
    from launch.machine import resolve_processes
    from launch.ranks import Placement
    from launch.supervision import Patience

    count = resolve_processes(processes)
    world = world_size or count
    if first_rank + count > world:
        raise UserError(f"--first-rank {first_rank} + {count} processes are more than --world-size {world}")
    if world > count and master_port is None:
        raise UserError("several machines need the same --master-port on each")
    grace = check_command(command, world)
    argv = invocation.resolve_command(command)
    if dry_run:
        typer.echo(f"{count} x {shlex.join(argv)}")
        return DONE
    run = invocation.run_directory(command)
    return spawn(
        argv,
        count,
        placement=Placement(first_rank, world, master_addr, master_port),
        logs=logs or (run / "logs" if run else None),
        control=sys.stdin.fileno() if control else None,
        patience=None if grace is None else Patience.with_grace(grace),
        hold_signals=invocation.configuration_of(command) is not None,
    )

"""`internimage launch hostfile`."""

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

from data_pipeline.errors import DONE
from launch.commands.launch.options import Command, DryRun, Logs, RestartPause, check_command

EXAMPLE = "internimage launch hostfile --hostfile hosts.txt pretrain internimage_l_in22k"


def hostfile(
    command: Command,
    hosts: Annotated[Path, typer.Option("--hostfile", help="File of lines as `node1 slots=8`.")],
    ssh: Annotated[str, typer.Option(help="How to reach a host.")] = "ssh -o BatchMode=yes -o ConnectTimeout=20",
    master_addr: Annotated[str | None, typer.Option(help="Address of the first host. [default: its name]")] = None,
    master_port: Annotated[int, typer.Option(help="Rank 0's port; one higher at each restart.")] = 29400,
    export: Annotated[list[str] | None, typer.Option(help="A further variable to take along. Repeatable.")] = None,
    max_restarts: Annotated[
        int, typer.Option(min=0, help="Start again after a failure so often in a row without a new checkpoint.")
    ] = 3,
    restart_pause: RestartPause = 10.0,
    logs: Logs = None,
    dry_run: DryRun = False,
) -> int:
    """Start COMMAND on every host of a hostfile by ssh; same paths and environment on each."""
    from launch import invocation
    from launch.hostfile import carried_environment, masked, read_hostfile, remote_commands, run_hosts
    from launch.restarting import Budget, keep_running
    from launch.supervision import say

    found = read_hostfile(hosts)
    check_command(command, sum(host.slots for host in found))
    run = invocation.run_directory(command)
    environment = carried_environment(os.environ, export or ())

    def commands(port: int) -> list[str]:
        return remote_commands(
            found,
            command,
            master_addr=master_addr,
            master_port=port,
            logs=logs or (run / "logs" if run else None),
            environment=environment,
        )

    if dry_run:
        for host, line in zip(found, commands(master_port), strict=True):
            typer.echo(shlex.join([*shlex.split(ssh), host.name, line]))
        typer.echo("with, by standard input: " + shlex.join(f"{k}={v}" for k, v in masked(environment).items()))
        return DONE

    def start(number: int) -> int:
        return run_hosts(found, commands(master_port + number), shlex.split(ssh), environment)

    return keep_running(start, run, Budget(max_restarts, restart_pause, queue=False), say=say)

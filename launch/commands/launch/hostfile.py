"""`internimage launch hostfile`."""

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

from data_pipeline.errors import DONE
from launch.commands.launch.options import Command, DryRun, Logs, check_command

EXAMPLE = "internimage launch hostfile --hostfile hosts.txt pretrain internimage_l_in22k"


def hostfile(
    command: Command,
    hosts: Annotated[Path, typer.Option("--hostfile", help="File of lines as `node1 slots=8`.")],
    ssh: Annotated[str, typer.Option(help="How to reach a host.")] = "ssh -o BatchMode=yes -o ConnectTimeout=20",
    master_addr: Annotated[str | None, typer.Option(help="Address of the first host. [default: its name]")] = None,
    master_port: Annotated[int, typer.Option(help="Rank 0's port.")] = 29400,
    export: Annotated[list[str] | None, typer.Option(help="A further variable to take along. Repeatable.")] = None,
    logs: Logs = None,
    dry_run: DryRun = False,
) -> int:
    """Start COMMAND on every host of a hostfile by ssh; same paths and environment on each."""
    from launch import invocation
    from launch.hostfile import carried_environment, read_hostfile, remote_commands, run_hosts

    found = read_hostfile(hosts)
    check_command(command, sum(host.slots for host in found))
    run = invocation.run_directory(command)
    commands = remote_commands(
        found,
        command,
        master_addr=master_addr,
        master_port=master_port,
        logs=logs or (run / "logs" if run else None),
        environment=carried_environment(os.environ, export or ()),
    )
    if dry_run:
        for host, line in zip(found, commands, strict=True):
            typer.echo(shlex.join([*shlex.split(ssh), host.name, line]))
        return DONE
    return run_hosts(found, commands, shlex.split(ssh))

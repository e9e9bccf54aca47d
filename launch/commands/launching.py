"""`internimage launch local|hostfile|slurm COMMAND`: the same command on one machine or on many."""

import math
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from data_pipeline.errors import DONE

app = typer.Typer(
    help="Start a command as ranks: on this machine, over ssh, or by Slurm.",
    epilog="Example: internimage launch slurm --nodes 16 pretrain internimage_h_m3i_427m --output runs/h",
    no_args_is_help=True,
)

# What follows COMMAND belongs to COMMAND.
_PASS_THROUGH: dict[str, Any] = {"allow_interspersed_args": False, "ignore_unknown_options": False}
Command = Annotated[list[str], typer.Argument(metavar="COMMAND...", help="`pretrain CONFIG ...`, or any program.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be started, and stop.")]
Logs = Annotated[Path | None, typer.Option(help="Folder for the other ranks' output. [default: RUN/logs]")]


@app.command(
    context_settings=_PASS_THROUGH, epilog="Example: internimage launch local --processes 8 pretrain internimage_t_in1k"
)
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
    grace = _preflight(command, world)
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


@app.command(
    context_settings=_PASS_THROUGH,
    epilog="Example: internimage launch hostfile --hostfile hosts.txt pretrain internimage_l_in22k",
)
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
    from launch import hostfile as work
    from launch import invocation

    found = work.read_hostfile(hosts)
    _preflight(command, sum(host.slots for host in found))
    run = invocation.run_directory(command)
    commands = work.remote_commands(
        found,
        command,
        master_addr=master_addr,
        master_port=master_port,
        logs=logs or (run / "logs" if run else None),
        environment=work.carried_environment(os.environ, export or ()),
    )
    if dry_run:
        for host, line in zip(found, commands, strict=True):
            typer.echo(shlex.join([*shlex.split(ssh), host.name, line]))
        return DONE
    return work.run(found, commands, shlex.split(ssh))


@app.command(
    context_settings=_PASS_THROUGH,
    epilog="Example: internimage launch slurm --nodes 2 --gpus-per-node 8 pretrain internimage_h_m3i_427m",
)
def slurm(
    command: Command,
    nodes: Annotated[int, typer.Option(min=1)] = 1,
    ranks_per_node: Annotated[int | None, typer.Option(min=1, help="[default: GPUs per node, or 1]")] = None,
    gpus_per_node: Annotated[str | None, typer.Option(help="As 8 or h100:8.")] = None,
    cpus_per_rank: Annotated[int | None, typer.Option(min=1)] = None,
    time: Annotated[str | None, typer.Option(help="[days-]hours:minutes:seconds.")] = None,
    partition: Annotated[str | None, typer.Option()] = None,
    account: Annotated[str | None, typer.Option()] = None,
    qos: Annotated[str | None, typer.Option()] = None,
    mem: Annotated[str | None, typer.Option(help="Memory per node, as 500G.")] = None,
    signal_seconds: Annotated[
        int | None,
        typer.Option(min=1, help="Ask the ranks to save so long before the limit. [default: their grace + 30, or 300]"),
    ] = None,
    wait_seconds: Annotated[int, typer.Option(min=0, help="End the others so long after the first rank ended.")] = 60,
    array: Annotated[int | None, typer.Option(min=1, help="A chain of N jobs in place of requeueing.")] = None,
    name: Annotated[str | None, typer.Option(help="Job name. [default: the run directory's]")] = None,
    setup: Annotated[list[str] | None, typer.Option(help="Shell line before the ranks start. Repeatable.")] = None,
    sbatch: Annotated[
        list[str] | None, typer.Option(help="Further option, as --sbatch=--exclusive. Repeatable.")
    ] = None,
    container: Annotated[str | None, typer.Option(help="Image to run in.")] = None,
    container_mounts: Annotated[str | None, typer.Option(help="HOST:INSIDE,...")] = None,
    container_runtime: Annotated[str, typer.Option(help="pyxis or apptainer.")] = "pyxis",
    dry_run: DryRun = False,
) -> int:
    """Write, show and submit an sbatch script that saves before the time limit and starts itself again."""
    from data_pipeline.errors import UserError
    from launch import invocation
    from launch import slurm as work
    from launch.stopping import MARGIN_SECONDS, seconds_to_stop

    if container_runtime not in ("pyxis", "apptainer"):
        raise UserError(f"--container-runtime {container_runtime!r}: expected pyxis or apptainer")
    gpus = gpus_per_node.rpartition(":")[2] if gpus_per_node else "1"
    if not gpus.isdigit():
        raise UserError(f"--gpus-per-node {gpus_per_node!r}: expected a number or TYPE:NUMBER, as h100:8")
    ranks_per_node = ranks_per_node or int(gpus)
    grace = _preflight(command, nodes * ranks_per_node)
    needed = work.SlurmJob.signal_seconds if grace is None else math.ceil(seconds_to_stop(grace))
    if grace is not None and signal_seconds is not None and signal_seconds < needed:
        raise UserError(
            f"--signal-seconds {signal_seconds}: the ranks may save for {grace:g} s, and {MARGIN_SECONDS:g} s go into "
            f"leaving: ask {needed} s before the limit, or set training.policy.grace_seconds"
        )
    run = invocation.run_directory(command)
    argv = invocation.resolve_command(command, portable=container is not None)
    job = work.SlurmJob(
        command=work.command_words(argv),
        name=name or (run.name if run else "internimage"),
        nodes=nodes,
        ranks_per_node=ranks_per_node,
        gpus_per_node=gpus_per_node,
        cpus_per_rank=cpus_per_rank,
        time=time,
        partition=partition,
        account=account,
        qos=qos,
        memory=mem,
        signal_seconds=signal_seconds or needed,
        wait_seconds=wait_seconds,
        array=array,
        logs=str(run.absolute() / "logs") if run else os.getcwd(),
        run=str(run.absolute()) if run else None,
        directory=os.getcwd(),
        script=str((run or Path()).absolute() / "slurm.sh"),
        container=work.Container(container, container_mounts, container_runtime) if container else None,
        setup=tuple(setup or ()),
        extra=tuple(sbatch or ()),
    )
    if dry_run:
        typer.echo(work.script(job), nl=False)
        return DONE
    number = work.submit(job)
    typer.echo(f"submitted job {number} ({job.script}); output in {job.logs}")
    return DONE


def _preflight(command: list[str], world_size: int) -> float | None:
    """A COMMAND that is `pretrain CONFIG ...` is checked here, before it costs a queue's wait.

    Returns the seconds that its ranks are given to save; None for other programs.
    """
    from launch import invocation, preflight

    given = invocation.configuration_of(command)
    if given is None:
        return None
    from pretrain.configuration import load_config

    config = load_config(*given)
    preflight.check_run(config, world_size)
    return config.training.policy.grace_seconds

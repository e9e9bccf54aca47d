"""`internimage launch slurm`."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from data_pipeline.errors import DONE
from launch.commands.launch.options import DryRun, RestartPause, check_command

EXAMPLE = "internimage launch slurm --nodes 2 --gpus-per-node 8 pretrain internimage_h_m3i_427m"


_OF_TASKS = (  # parameters that an array of tasks has, too
    "command", "tasks", "name", "cpus_per_rank", "time", "partition", "account", "qos", "mem", "signal_seconds",
    "after", "setup", "sbatch", "dry_run",
)  # fmt: skip


def slurm(
    context: typer.Context,
    command: Annotated[
        list[str] | None, typer.Argument(metavar="COMMAND...", help="`pretrain CONFIG ...`, or any program.")
    ] = None,
    nodes: Annotated[int, typer.Option(min=1)] = 1,
    spare_nodes: Annotated[int, typer.Option(min=0, help="Further nodes that stand by for one that fails.")] = 0,
    ranks_per_node: Annotated[int | None, typer.Option(min=1, help="[default: GPUs per node, or 1]")] = None,
    gpus_per_node: Annotated[str | None, typer.Option(help="As 8 or h100:8.")] = None,
    gpus_per_rank: Annotated[
        int | None, typer.Option(min=1, max=1, help="1: ask with --gpus-per-task, where each rank sees its GPU alone.")
    ] = None,
    cpus_per_rank: Annotated[
        int | None, typer.Option(min=1, help="[default: data.workers + 2, where COMMAND is a training]")
    ] = None,
    time: Annotated[str | None, typer.Option(help="[days-]hours:minutes:seconds.")] = None,
    partition: Annotated[str | None, typer.Option()] = None,
    account: Annotated[str | None, typer.Option()] = None,
    qos: Annotated[str | None, typer.Option()] = None,
    mem: Annotated[
        str | None, typer.Option(help="Memory per node, as 500G. [default: 4 GB a core, where COMMAND is a training]")
    ] = None,
    signal_seconds: Annotated[
        int | None,
        typer.Option(min=1, help="Ask the ranks to save so long before the limit. [default: their grace + 30, or 300]"),
    ] = None,
    wait_seconds: Annotated[int, typer.Option(min=0, help="End the others so long after the first rank ended.")] = 60,
    max_restarts: Annotated[
        int, typer.Option(min=0, help="Start again after a failure so often in a row without a new checkpoint.")
    ] = 3,
    restart_pause: RestartPause = 10.0,
    gate: Annotated[
        bool, typer.Option(help="Before each start of a training, check every node (`doctor --distributed`).")
    ] = True,
    array: Annotated[int | None, typer.Option(min=1, help="A chain of N jobs in place of requeueing.")] = None,
    tasks: Annotated[
        int | None, typer.Option(min=1, help="Share `shards pack|fetch|reshard|merge|split` among N tasks of an array.")
    ] = None,
    after: Annotated[list[str] | None, typer.Option(help="Start when this job has ended well. Repeatable.")] = None,
    chain: Annotated[
        str | None,
        typer.Option(
            metavar="CONFIG,CONFIG,...",
            help="One job a stage, each from the run before; evaluate:SET scores. COMMAND is then KEY=VALUE ...",
        ),
    ] = None,
    sweep: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE,...", help="One job a value. Repeatable: all combinations.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Of a chain: folder of its runs. [default: runs]")] = None,
    name: Annotated[str | None, typer.Option(help="Job name. [default: the run directory's]")] = None,
    setup: Annotated[list[str] | None, typer.Option(help="Shell line before the ranks start. Repeatable.")] = None,
    sbatch: Annotated[
        list[str] | None, typer.Option(help="Further option, as --sbatch=--exclusive. Repeatable.")
    ] = None,
    container: Annotated[str | None, typer.Option(help="Image to run in.")] = None,
    container_mounts: Annotated[
        str | None, typer.Option(help="HOST:INSIDE,... beside the run's folder and the working directory.")
    ] = None,
    container_runtime: Annotated[str, typer.Option(help="pyxis or apptainer.")] = "pyxis",
    dry_run: DryRun = False,
) -> int:
    """Write, show and submit an sbatch script that saves before the time limit and starts itself again."""
    from data_pipeline.errors import UserError
    from launch import invocation, stages
    from launch.batch_script import script
    from launch.job import WARNING_SECONDS, Container, SlurmJob, command_words
    from launch.needs import cores_per_rank, node_memory
    from launch.restarting import Budget
    from launch.slurm import submit
    from launch.stopping import MARGIN_SECONDS, seconds_to_stop

    if container_runtime not in ("pyxis", "apptainer"):
        raise UserError(f"--container-runtime {container_runtime!r}: expected pyxis or apptainer")
    gpus = gpus_per_node.rpartition(":")[2] if gpus_per_node else "1"
    if not gpus.isdigit():
        raise UserError(f"--gpus-per-node {gpus_per_node!r}: expected a number or TYPE:NUMBER, as h100:8")
    ranks = ranks_per_node or int(gpus)
    here, words = Path.cwd(), list(command or ())
    if tasks is not None:
        from launch.commands.options import refuse_other_options
        from launch.slurm import hand_over
        from launch.task_array import TaskArray, array_script, shared_command

        refuse_other_options(context, _OF_TASKS, "--tasks")
        shared = TaskArray(
            command=shared_command(words, tasks),
            tasks=tasks,
            name=name or "internimage-shards",
            cpus_per_task=cpus_per_rank,
            time=time,
            partition=partition,
            account=account,
            qos=qos,
            memory=mem,
            signal_seconds=signal_seconds or WARNING_SECONDS,
            logs=str(here),
            directory=str(here),
            after=tuple(after or ()),
            setup=tuple(setup or ()),
            extra=tuple(sbatch or ()),
        )
        if dry_run:
            typer.echo(array_script(shared), nl=False)
            return DONE
        number = hand_over(array_script(shared), here / "shards.sh", here)
        typer.echo(f"submitted array {number} of {tasks} tasks (shards.sh); output in {here}")
        return DONE
    coming: list[str] = []  # runs that earlier stages make

    def job_for(words: list[str], waits_for: tuple[str, ...]) -> SlurmJob:
        config = check_command(words, nodes * ranks, coming)
        alone = words[:1] == ["evaluate"]  # one process
        grace = None if config is None else config.training.policy.grace_seconds
        needed = WARNING_SECONDS if grace is None else math.ceil(seconds_to_stop(grace))
        if grace is not None and signal_seconds is not None and signal_seconds < needed:
            raise UserError(
                f"--signal-seconds {signal_seconds}: the ranks may save for {grace:g} s, and {MARGIN_SECONDS:g} s go "
                f"into leaving: ask {needed} s before the limit, or set training.policy.grace_seconds"
            )
        cores, memory = cpus_per_rank, mem
        if config is not None and cores is not None and memory is None:
            memory = node_memory(cores, ranks)
            typer.echo(f"asks for {memory} a node, 4 GB a core; --mem says otherwise", err=True)
        elif config is not None and cores is None:
            cores = cores_per_rank(config)
            memory = memory or node_memory(cores, ranks)
            typer.echo(
                f"asks for {cores} cores a rank (data.workers {config.data.workers} + 2) and {memory} a node; "
                "--cpus-per-rank and --mem say otherwise",
                err=True,
            )
        run = invocation.run_directory(words)
        inside = container is not None
        check = ["internimage", "doctor", "--distributed", "--gate"]
        return SlurmJob(
            command=command_words(invocation.resolve_command(words, portable=inside)),
            name=name or (run.name if run else "internimage"),
            nodes=1 if alone else nodes,
            spare_nodes=0 if alone else spare_nodes,
            ranks_per_node=1 if alone else ranks,
            gpus_per_node=gpus_per_node,
            gpus_per_rank=gpus_per_rank,
            cpus_per_rank=cores,
            time=time,
            partition=partition,
            account=account,
            qos=qos,
            memory=memory,
            signal_seconds=signal_seconds or needed,
            wait_seconds=wait_seconds,
            restarts=Budget(max_restarts, restart_pause, spare_nodes),
            gate=tuple(invocation.resolve_command(check, portable=inside)) if gate and config is not None else (),
            array=array,
            after=waits_for,
            logs=str(run.absolute() / "logs") if run else str(here),
            run=str(run.absolute()) if run else None,
            directory=str(here),
            script=str((run or Path()).absolute() / "slurm.sh"),
            container=Container(container, container_mounts, container_runtime) if container else None,
            setup=tuple(setup or ()),
            extra=tuple(sbatch or ()),
        )

    if chain is not None:
        if array is not None:
            raise UserError(
                "--chain, --array: a stage waits until every job of the one before has ended well, which those of an "
                "array do not; leave --array out (a stage is requeued as often as it needs), or submit one stage with "
                "--array at a time"
            )
        from pretrain.configuration import load_config

        commands = stages.chain(chain.split(","), words, output, lambda config: load_config(config).task.name)
    else:
        commands = stages.sweep(words, sweep) if sweep else [words]
    coming += [str(found) for one in commands if (found := invocation.run_directory(one)) is not None]
    jobs = [job_for(one, tuple(after or ())) for one in commands]  # every mistake is found before a job is queued
    if dry_run:
        typer.echo("\n".join(script(job) for job in jobs), nl=False)
        return DONE
    before: tuple[str, ...] = tuple(after or ())
    for job in jobs:
        number = submit(replace(job, after=before))
        before = (number,) if chain is not None else before
        typer.echo(f"submitted job {number} ({job.script}); output in {job.logs}")
    return DONE

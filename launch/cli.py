"""The command `internimage`: every room's commands under one roof.

    shards      prepare data                        pretrain, finetune      train
    evaluate    score a checkpoint                  export, embed           hand a checkpoint on, or its vectors
    predict     a fine-tuned run on pictures
    launch      start on one machine or many        plan, doctor            before a run
    status      where runs stand                    logs                    what a rank has written
    inspect     look at what is there               report                  a run as one page
    demo        the whole way on the embedded set   study                   which part brings what

Modules under `launch.commands` declare arguments and import the room that does the work only when called, so `--help`
imports no torch.
"""

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer

from launch import exits
from launch.commands import (
    demo,
    doctor,
    embed,
    evaluate,
    export,
    finetune,
    inspect,
    launch,
    logs,
    plan,
    predict,
    pretrain,
    report,
    shards,
    status,
    study,
)

app = typer.Typer(
    name="internimage",
    help="Pretrain InternImage on image-text data: shards in, a fine-tuned and evaluated model out.",
    epilog="Example: internimage demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(shards.app, name="shards")
app.command(epilog=f"Example: {pretrain.EXAMPLE}")(pretrain.pretrain)
app.command(epilog=f"Example: {finetune.EXAMPLE}")(finetune.finetune)
app.command(epilog=f"Example: {evaluate.EXAMPLE}")(evaluate.evaluate)
app.command(epilog=f"Example: {predict.EXAMPLE}")(predict.predict)
app.command(epilog=f"Example: {embed.EXAMPLE}")(embed.embed)
app.command(epilog=f"Example: {export.EXAMPLE}")(export.export)
app.command(epilog=f"Example: {report.EXAMPLE}")(report.report)
app.add_typer(launch.app, name="launch")
app.command(epilog=f"Example: {status.EXAMPLE}")(status.status)
app.command(epilog=f"Example: {logs.EXAMPLE}")(logs.logs)
app.command(epilog=f"Example: {plan.EXAMPLE}")(plan.plan)
app.command(epilog=f"Example: {doctor.EXAMPLE}")(doctor.doctor)
app.add_typer(inspect.app, name="inspect")
app.command(epilog=f"Example: {study.EXAMPLE}")(study.study)
app.command(epilog=f"Example: {demo.EXAMPLE}")(demo.demo)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            typer.echo(version("internimage-pretrain"))
        except PackageNotFoundError:
            typer.echo("not installed (running from the source tree)")
        raise typer.Exit


@app.callback()
def _root(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks (accepted after any command but launch, too).")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    if debug:
        os.environ[exits.DEBUG_VARIABLE] = "1"


def run(arguments: Sequence[str]) -> int:
    """One command line -> its exit code. Never raises."""
    arguments = _debug_first(without_local_rank(arguments))

    def command() -> Any:
        return app(args=arguments, prog_name="internimage", standalone_mode=False)

    return exits.guarded(command)


def main() -> NoReturn:
    code = run(sys.argv[1:])
    if "pretrain.training.distributed" in sys.modules:  # this process was a rank
        from pretrain.training.distributed import leave

        leave(code)
    sys.exit(code)


def without_local_rank(arguments: Sequence[str]) -> list[str]:
    """In a rank: the command line without the `--local_rank=N` that DeepSpeed's launcher puts before it, and older ones
    of torch, too; N becomes LOCAL_RANK unless that is set. Elsewhere the arguments as they are.
    """
    if "RANK" not in os.environ:
        return list(arguments)
    kept, rest = [], iter(arguments)
    for word in rest:
        name, equals, value = word.partition("=")
        if name not in ("--local_rank", "--local-rank"):
            kept.append(word)
            continue
        os.environ.setdefault("LOCAL_RANK", value if equals else next(rest, "0"))
    return kept


def _debug_first(arguments: list[str]) -> list[str]:
    """`--debug` belongs to the root command; people write it last. What follows `launch` is another command's."""
    if "launch" in arguments[:2] or "--debug" not in arguments:
        return arguments
    return ["--debug", *(a for a in arguments if a != "--debug")]

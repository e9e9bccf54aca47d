"""`internimage launch local|hostfile|slurm COMMAND`: the same command on one machine or on many."""

from typing import Any

import typer

from launch.commands.launch import hostfile, local, slurm

app = typer.Typer(
    help="Start a command as ranks: on this machine, over ssh, or by Slurm.",
    epilog="Example: internimage launch slurm --nodes 16 pretrain internimage_h_m3i_427m --output runs/h",
    no_args_is_help=True,
)
# What follows COMMAND belongs to COMMAND.
_PASS_THROUGH: dict[str, Any] = {"allow_interspersed_args": False, "ignore_unknown_options": False}
app.command(context_settings=_PASS_THROUGH, epilog=f"Example: {local.EXAMPLE}")(local.local)
app.command(context_settings=_PASS_THROUGH, epilog=f"Example: {hostfile.EXAMPLE}")(hostfile.hostfile)
app.command(context_settings=_PASS_THROUGH, epilog=f"Example: {slurm.EXAMPLE}")(slurm.slurm)

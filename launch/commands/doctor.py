"""`internimage doctor`: what this machine has, or how all nodes of a job compare."""

import os
from typing import Annotated

import typer

from data_pipeline.errors import DONE, OTHER
from launch.commands.options import Json

EXAMPLE = "internimage doctor --json"


def doctor(
    distributed: Annotated[
        bool, typer.Option("--distributed", help="Under a launcher: measure and compare every node and GPU.")
    ] = False,
    gate: Annotated[
        bool, typer.Option("--gate", hidden=True, help="With --distributed: leave a word for the sbatch script.")
    ] = False,
    json: Json = False,
) -> int:
    """Versions, devices, operator backends, compilers, memory and disk of this machine, or of a whole job."""
    from launch.display import columns, show

    if not distributed:
        from launch.doctor import examine

        show(examine(), as_json=json)
        return DONE
    from launch.health import findings, leave_word, measure

    readings = measure()
    wrong = findings(readings)
    if gate:
        return DONE if leave_word(readings, os.environ["WORD"]) else OTHER
    if readings and os.environ.get("RANK", "0") == "0":
        if json:
            show({"ranks": readings, "findings": wrong}, as_json=True)
        else:
            heads = ("rank", "node", "device", "TFLOP/s", "copy", "upload", "inside", "between", "clock")
            rows = [
                [
                    *(str(one.rank), one.node, one.device, f"{one.tflops:.3g}", f"{one.copy:.3g}", f"{one.upload:.3g}"),
                    *("-" if rate is None else f"{rate:.3g}" for rate in (one.inside, one.between)),
                    f"{one.clock:+.2f}",
                ]
                for one in readings
            ]
            typer.echo(columns(rows, heads))
            typer.echo("Rates in GB/s but the first; clocks in seconds.")
            for node, sentences in wrong.items():
                typer.echo("\n".join([f"{node}:", *(f"  {text}" for text in sentences)]))
            if not wrong:
                typer.echo("No node is slow or differs.")
    return OTHER if wrong else DONE

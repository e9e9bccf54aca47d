"""`internimage demo`: the whole way on the embedded set."""

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: internimage demo --output runs/demo")(demo)


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for shards, runs and the report.")] = Path(
        "runs/demo"
    ),
) -> int:
    """Shards, pretraining with a stop in the middle, fine-tuning, scores and a report, in minutes."""
    from pretrain.demo import run

    return int(run(output) or 0)
